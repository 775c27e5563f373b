"""What computes a layer whose experts travel between host memory and a device."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from moe_runtime.layer import ExpertMath, LayerMath
from moe_runtime.memory.stream import Stream

# T tokens, K top-k, E experts, D model dim, R rows, S slots


class DeviceRows(Protocol):
    """The routed rows of one layer in one forward; those of an expert are neighbours.

    Everything is queued on a stream. `sort` comes first, then `place` once the host knows the
    routing, each expert once in any order, `combine` at the end. Who computes an expert elsewhere
    writes its rows of `output_RD`, which are not weighted.
    """

    output_RD: torch.Tensor

    def sort(self, compute: Stream) -> None:
        """Queue the sort of the rows."""

    def place(self, counts: Sequence[int], slots: Mapping[int, int], compute: Stream) -> None:
        """Expert e has `counts[e]` rows and, if the device computes it, is in `slots[e]`."""

    def rows_of(self, expert: int) -> slice:
        """Its rows of `output_RD`."""

    def tokens_of(self, expert: int, index_TK: torch.Tensor) -> torch.Tensor:
        """The tokens of its rows, by the routing on the host."""

    def compute(self, experts: Sequence[int], compute: Stream) -> None:
        """Queue the products of `experts`."""

    def combine(self, total_TD: torch.Tensor, compute: Stream) -> None:
        """Queue the weighted sum of each token's rows."""


class GroupedKernel(Protocol):
    """Products of many experts at once, which read weights where they lie in slots.

    `stacked` holds each parameter over all slots, `[S, ...]`; `slots_E` int32 each expert's slot.
    """

    @property
    def path(self) -> str: ...

    def run(
        self,
        hidden_TD: torch.Tensor,
        top_k_index_TK: torch.Tensor,
        top_k_weights_TK: torch.Tensor,
        stacked: Mapping[str, torch.Tensor],
        slots_E: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's output `[T, D]`, and the rows of each expert `[E]`; never waits."""

    def rows(
        self,
        hidden_TD: torch.Tensor,
        top_k_index_TK: torch.Tensor,
        top_k_weights_TK: torch.Tensor,
        stacked: Mapping[str, torch.Tensor],
    ) -> DeviceRows:
        """The same layer, expert by expert as they arrive. An expert's bits are those of `run`."""


@dataclass(frozen=True, slots=True)
class TieredMath:
    """The ways to compute one layer.

    Without `grouped`, `torch_math` computes one expert after the other on the device. Without
    `host`, every expert is computed on the device: so it is where the reference's bits are asked
    for, and where what follows the products has weights there.
    """

    torch_math: ExpertMath
    grouped: GroupedKernel | None
    host: LayerMath | None

    @property
    def path(self) -> str:
        """What computes, as reports name it."""
        device = self.torch_math.path if self.grouped is None else self.grouped.path
        return device if self.host is None else f"{device}; on the CPU {self.host.path}"
