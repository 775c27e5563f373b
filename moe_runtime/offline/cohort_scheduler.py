"""Sequences that start together and are padded to one length: for a cache that knows no pages."""

from collections import deque
from collections.abc import Iterable

from moe_runtime.offline.page_table import PageTable, pages_for
from moe_runtime.offline.pass_scheduler import PassPlan
from moe_runtime.offline.sequence import Sequence


class CohortScheduler:
    """Runs as many sequences as are sure to fit to their end, then the next ones.

    Each is counted as long as the longest prompt and the longest answer of its cohort. Every
    sequence must fit by itself.
    """

    num_preempted = 0

    def __init__(
        self, sequences: Iterable[Sequence], table: PageTable, *, max_sequences: int
    ) -> None:
        self._waiting = deque(sequences)
        self._running: list[Sequence] = []
        self._table = table
        self._max_sequences = max_sequences

    def next_pass(self) -> PassPlan | None:
        if self._running:
            return PassPlan(decoding=tuple(self._running), prompts=())
        if not self._waiting:
            return None
        prompts: list[Sequence] = []
        longest_prompt = longest_answer = 0
        while self._waiting and len(prompts) < self._max_sequences:
            one = self._waiting[0]
            prompt = max(longest_prompt, len(one.prompt_ids))
            answer = max(longest_answer, one.max_new_tokens)
            if prompts and (len(prompts) + 1) * pages_for(prompt + answer) > self._table.num_pages:
                break
            prompts.append(self._waiting.popleft())
            longest_prompt, longest_answer = prompt, answer
        for one in prompts:
            self._table.hold(one.number, min(longest_prompt + longest_answer, one.most_tokens))
        self._running = prompts
        return PassPlan(decoding=(), prompts=tuple(prompts))

    def finish(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._table.release(sequence.number)
