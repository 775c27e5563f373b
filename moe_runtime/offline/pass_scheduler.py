"""Which sequences run in the next pass: those that decode first, then prompts."""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from moe_runtime.offline.page_table import PageTable, pages_for
from moe_runtime.offline.sequence import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class PassPlan:
    """One token each of `decoding`, all tokens of `prompts`; pages are there for all of them."""

    decoding: tuple[Sequence, ...]
    prompts: tuple[Sequence, ...]

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        return self.decoding + self.prompts

    @property
    def num_tokens(self) -> int:
        return len(self.decoding) + sum(prompt.num_tokens for prompt in self.prompts)


class Scheduler(Protocol):
    """Hands out passes until all sequences have finished."""

    @property
    def num_preempted(self) -> int: ...

    def next_pass(self) -> PassPlan | None:
        """What runs next, or None when nothing is left."""

    def finish(self, sequence: Sequence) -> None:
        """`sequence` wants no more tokens."""


class PassScheduler:
    """MoE-Lens' resource-aware scheduler (arXiv 2504.09345, section 5): all decodes, then prompts.

    Prompts join up to `pass_tokens()` tokens a pass, in the order given, and at least one of them.
    Where pages run out, the sequence that joined last gives its own back and waits at the head of
    the line, to be run again with what it has written. Every sequence must fit by itself.
    """

    def __init__(
        self,
        sequences: Iterable[Sequence],
        table: PageTable,
        *,
        pass_tokens: Callable[[], int],
        max_sequences: int,
    ) -> None:
        self.num_preempted = 0
        self._waiting = deque(sequences)
        self._running: list[Sequence] = []  # in the order in which they joined
        self._table = table
        self._pass_tokens = pass_tokens
        self._max_sequences = max_sequences
        for sequence in self._waiting:
            assert pages_for(sequence.most_tokens) <= table.num_pages, sequence.number

    def next_pass(self) -> PassPlan | None:
        num_preempted = self.num_preempted
        for sequence in [one for one in self._running if self._needs_page(one)]:
            # Those behind it joined later: they give way.
            while sequence in self._running and not self._table.can_hold(
                sequence.number, sequence.num_tokens
            ):
                self._preempt(self._running[-1])
            if sequence in self._running:
                self._table.hold(sequence.number, sequence.num_tokens)
        decoding = tuple(self._running)
        # Whoever came in now would be the next to go.
        prompts = self._admit(len(decoding)) if self.num_preempted == num_preempted else []
        if not decoding and not prompts:
            assert not self._waiting
            return None
        return PassPlan(decoding=decoding, prompts=tuple(prompts))

    def finish(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._table.release(sequence.number)

    def _admit(self, num_tokens: int) -> list[Sequence]:
        prompts: list[Sequence] = []
        if not self._waiting:
            return prompts
        limit = self._pass_tokens()
        num_growing = sum(map(self._may_grow, self._running))
        while self._waiting and len(self._running) < self._max_sequences:
            sequence = self._waiting[0]
            if prompts and num_tokens + sequence.num_tokens > limit:
                break
            # Each that grows may want a page more before any of them ends.
            needed = self._table.missing(sequence.number, sequence.num_tokens) + num_growing
            if self._running and needed > self._table.num_free:
                break
            self._waiting.popleft()
            self._table.hold(sequence.number, sequence.num_tokens)
            num_growing += self._may_grow(sequence)
            self._running.append(sequence)
            prompts.append(sequence)
            num_tokens += sequence.num_tokens
        return prompts

    def _needs_page(self, sequence: Sequence) -> bool:
        return self._table.missing(sequence.number, sequence.num_tokens) > 0

    def _may_grow(self, sequence: Sequence) -> bool:
        return self._table.missing(sequence.number, sequence.most_tokens) > 0

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._table.release(sequence.number)
        self._waiting.appendleft(sequence)
        self.num_preempted += 1
