"""Forms units of two batches from prompts that wait: who runs together, and in which batch.

N sequences of a unit, P places: the (layer, expert) pairs of the model, in one row.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_runtime.expert import ExpertKey
from moe_runtime.scheduling.expected_paths import ExpectedPaths, experts_of
from moe_runtime.scheduling.expert_queues import ExpertQueues, Request
from moe_runtime.scheduling.token_scheduler import split_in_two
from moe_runtime.trace_fields import Array

_WAITING_UNITS = 8  # from which the next one is formed


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Sequences that run together, in two batches."""

    sequences: list[int]
    is_second_N: Array


class UnitPlanner:
    """Gives one unit after the other; `seconds` is what that took so far.

    `ids` are the prompts, by sequence. Without `paths` units are in their order.
    """

    def __init__(
        self,
        ids: Sequence[list[int]],
        paths: ExpectedPaths | None,
        num_experts: int,
        batch_size: int,
        max_passes: int,
    ) -> None:
        self.seconds = 0.0
        self._ids = ids
        self._paths = paths
        self._num_experts = num_experts
        self._batch_size = batch_size
        self._queues = ExpertQueues(max_tokens=2 * batch_size, max_passes=max_passes)
        self._num_pushed = 0
        self._path_of: dict[int, Array] = {}  # [P] of who waits

    def next_unit(self) -> Unit | None:
        """Up to 2 x `batch_size` sequences; None when all have had their turn."""
        started = time.perf_counter()
        self._fill()
        sequences = [request.number for request in self._queues.next_batch()]
        is_second_N = np.arange(len(sequences)) >= self._batch_size
        if self._paths is not None:
            path_NP = [self._path_of.pop(sequence) for sequence in sequences]
            if len(sequences) > self._batch_size:
                is_second_N = split_in_two(np.stack(path_NP))
        self.seconds += time.perf_counter() - started
        return Unit(sequences=sequences, is_second_N=is_second_N) if sequences else None

    def _fill(self) -> None:
        """So many wait that there is a choice, and not so many that predicting them takes long."""
        wanted = _WAITING_UNITS * 2 * self._batch_size
        while len(self._queues) < wanted and self._num_pushed < len(self._ids):
            sequence = self._num_pushed
            self._num_pushed += 1
            experts: frozenset[ExpertKey] = frozenset()
            if self._paths is not None:
                path_P = self._paths.of_prompt(sequence, self._ids[sequence])
                self._path_of[sequence] = path_P
                experts = experts_of(path_P, self._num_experts)
            self._queues.push(Request(number=sequence, num_tokens=1, experts=experts))
