"""Runs many sequences to their ends, pass by pass, each pass as large as memory and time allow."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from moe_runtime.offline.pass_scheduler import PassPlan, Scheduler
from moe_runtime.offline.pass_size import PassSize
from moe_runtime.offline.sequence import Sequence
from moe_runtime.offline.weight_reads import WeightReads


class Forward(Protocol):
    """The model, as a pass needs it."""

    def run(self, plan: PassPlan) -> torch.Tensor:
        """Logits `[sequences, vocabulary]` behind the last token of each of `plan.sequences`."""


@dataclass(slots=True, kw_only=True)
class PassReport:
    """What the passes did. A prompt that was preempted counts each time it runs.

    A pass may read ahead for the next one, so its reads are told by the experts that it used.
    """

    passes: int = 0
    decode_tokens: int = 0
    prompt_tokens: int = 0
    preempted: int = 0
    most_sequences: int = 0
    seconds: float = 0.0
    stall_seconds: float = 0.0
    read_bytes: int = 0
    most_pass_experts_loaded: int = 0


class OfflineEngine:
    """Continuous batching: a sequence that ends leaves at once, and the next one joins.

    `choose` picks a token for each row of the logits; `is_finished` is asked after each.
    """

    def __init__(
        self,
        forward: Forward,
        scheduler: Scheduler,
        pass_size: PassSize,
        *,
        weights: WeightReads,
        choose: Callable[[torch.Tensor, tuple[Sequence, ...]], list[int]],
        is_finished: Callable[[Sequence], bool],
    ) -> None:
        self.report = PassReport()
        self._forward = forward
        self._scheduler = scheduler
        self._pass_size = pass_size
        self._weights = weights
        self._choose = choose
        self._is_finished = is_finished

    def run(self) -> Iterator[Sequence]:
        """Yields each sequence when it has ended."""
        while (plan := self._scheduler.next_pass()) is not None:
            self._run_pass(plan)
            for sequence in plan.sequences:
                if self._is_finished(sequence):
                    self._scheduler.finish(sequence)
                    yield sequence

    def _run_pass(self, plan: PassPlan) -> None:
        weights, report = self._weights, self.report
        started, stalled = time.perf_counter(), weights.stall_seconds
        read_bytes, experts_loaded = weights.bytes_read, weights.experts_loaded
        tokens = self._choose(self._forward.run(plan), plan.sequences)
        for sequence, token in zip(plan.sequences, tokens, strict=True):
            sequence.written.append(token)
        seconds = time.perf_counter() - started
        stall_seconds = weights.stall_seconds - stalled
        read_bytes = weights.bytes_read - read_bytes
        experts_loaded = weights.experts_loaded - experts_loaded
        self._pass_size.add(plan.num_tokens, seconds - stall_seconds, seconds, read_bytes)
        report.passes += 1
        report.decode_tokens += len(plan.decoding)
        report.prompt_tokens += plan.num_tokens - len(plan.decoding)
        report.preempted = self._scheduler.num_preempted
        report.most_sequences = max(report.most_sequences, len(plan.sequences))
        report.seconds += seconds
        report.stall_seconds += stall_seconds
        report.read_bytes += read_bytes
        report.most_pass_experts_loaded = max(report.most_pass_experts_loaded, experts_loaded)
