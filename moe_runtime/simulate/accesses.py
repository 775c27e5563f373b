"""What the layers of a trace ask an expert cache for, in the order in which the runtime asks.

A accesses, V visits of a layer by a step, L MoE layers, E experts a layer.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from moe_runtime.expert import ExpertKey
from moe_runtime.trace import Trace
from moe_runtime.trace_fields import Array

# Visits that become Python objects at a time: enough to make numpy's part cheap.
_BLOCK_VISITS = 2**14


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Accesses:
    """Visit by visit the distinct experts that one step uses in one layer, ascending.

    Visits go step by step and, within a step, layer by layer. A key is numbered
    `layer * num_experts + expert`. Missing experts of a trace are left out, and so is a layer of
    which a step knows none.
    """

    key_number: Array  # [A] int32
    bounds: Array  # [V + 1] int64: visit v is key_number[bounds[v]:bounds[v + 1]]
    step: Array  # [V] int64, as the trace numbers them
    num_layers: int
    num_experts: int

    @classmethod
    def of(cls, trace: Trace) -> "Accesses":
        """Those of a whole trace, padding rows among them."""
        num_layers, num_experts = trace.num_layers, trace.num_experts
        step_index = np.cumsum(np.diff(trace.step, prepend=trace.step[:1]) != 0)
        visit = step_index[:, None] * num_layers + np.arange(num_layers)
        # One number that sorts by step, layer and expert
        order = visit[:, :, None] * num_experts + trace.topk
        order = order[trace.topk >= 0]
        order.sort()
        order = order[np.diff(order, prepend=-1) != 0]
        is_first = np.diff(order // num_experts, prepend=-1) != 0
        starts = np.flatnonzero(is_first)
        step_starts = np.flatnonzero(np.diff(step_index, prepend=-1))
        return cls(
            key_number=(order % (num_layers * num_experts)).astype(np.int32),
            bounds=np.append(starts, len(order)),
            step=trace.step[step_starts][order[starts] // (num_layers * num_experts)],
            num_layers=num_layers,
            num_experts=num_experts,
        )

    def __len__(self) -> int:
        return len(self.key_number)

    @property
    def num_keys(self) -> int:
        """Experts of all layers, used or not."""
        return self.num_layers * self.num_experts

    @property
    def layer(self) -> Array:
        """`[A]`: whose expert each access is."""
        return self.key_number // self.num_experts

    @property
    def expert(self) -> Array:
        """`[A]`: which of its layer's experts each access is."""
        return self.key_number % self.num_experts

    def visits(self) -> Iterator[list[ExpertKey]]:
        """The keys of each visit. Equal keys are one object, which dictionaries like."""
        keys = [ExpertKey(*divmod(n, self.num_experts)) for n in range(self.num_keys)]
        table = np.fromiter(keys, dtype=object, count=len(keys))
        for first in range(0, len(self.bounds) - 1, _BLOCK_VISITS):
            bounds = self.bounds[first : first + _BLOCK_VISITS + 1]
            block = table[self.key_number[bounds[0] : bounds[-1]]].tolist()
            for start, end in pairwise((bounds - bounds[0]).tolist()):
                yield block[start:end]

    def next_uses(self) -> Array:
        """`[A]`: at which access the key of each is used next; A or more if never."""
        # numpy sorts 16-bit numbers several times as fast
        numbers = self.key_number.astype(np.uint16) if self.num_keys <= 2**16 else self.key_number
        order = np.argsort(numbers, kind="stable")
        is_same_key = numbers[order[1:]] == numbers[order[:-1]]
        found = np.arange(len(self), 2 * len(self))
        found[order[:-1][is_same_key]] = order[1:][is_same_key]
        return found

    def most_used(self) -> list[ExpertKey]:
        """All keys that are used, most accesses first, lower keys first among equals."""
        uses = np.bincount(self.key_number, minlength=self.num_keys)
        order = np.argsort(-uses, kind="stable")[: np.count_nonzero(uses)]
        return [ExpertKey(*divmod(n, self.num_experts)) for n in order.tolist()]
