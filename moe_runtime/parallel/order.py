"""Orders: from rows with their routing to the rows of each expert, and back.

R rows here, K top-k, E experts, C rows of the expert that has most, D model dim, n rows of one.
"""

from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from moe_runtime.parallel.dispatcher import Rows

State = TypeVar("State")  # frozen: all that restore must know of arrange
ByExpert = dict[int, torch.Tensor]  # `[n, D]` of each expert that has rows


class Order(Protocol[State]):
    """FSMoE's Order and I-Order (arXiv 2501.10714, section 3): a layout and its inverse."""

    def arrange(self, rows: Rows, num_experts: int) -> tuple[ByExpert, State]:
        """What each expert is to compute; an id of `num_experts` asks for none."""

    def restore(self, outputs: ByExpert, state: State) -> torch.Tensor:
        """`[R, D]`: weighted sums of the experts' outputs, in float32 or wider."""


@dataclass(frozen=True, slots=True, eq=False)
class SortedRows:
    """The row and the weight of each (row, expert) pair, by expert."""

    row: ByExpert
    weight: ByExpert
    empty_RD: torch.Tensor  # in the dtype of sums, on no memory


class SortOrder:
    """Rows are gathered by expert, and added where they came from: K R D numbers move."""

    def arrange(self, rows: Rows, num_experts: int) -> tuple[ByExpert, SortedRows]:
        """By one stable sort of ids."""
        top_k = rows.index.shape[1]
        expert_N, order_N = rows.index.flatten().sort(stable=True)
        # sync: the host must know which experts have rows
        counts = torch.bincount(expert_N, minlength=num_experts + 1)[:num_experts].tolist()
        found: tuple[ByExpert, ByExpert, ByExpert] = ({}, {}, {})
        begin = 0
        for expert, count in enumerate(counts):
            if count:
                pairs_n = order_N[begin : begin + count]
                row_n = pairs_n // top_k
                found[0][expert] = rows.hidden[row_n]
                found[1][expert] = row_n
                found[2][expert] = rows.weights.flatten()[pairs_n]
                begin += count
        return found[0], SortedRows(found[1], found[2], _no_sums(rows))

    def restore(self, outputs: ByExpert, state: SortedRows) -> torch.Tensor:
        """In ascending order of experts."""
        total_RD = torch.zeros_like(state.empty_RD, memory_format=torch.contiguous_format)
        for expert, y_nD in sorted(outputs.items()):
            weight_n1 = state.weight[expert].to(total_RD.dtype).unsqueeze(1)
            total_RD.index_add_(0, state.row[expert], y_nD.to(total_RD.dtype) * weight_n1)
        return total_RD


@dataclass(frozen=True, slots=True, eq=False)
class Masks:
    """`combine [R, E, C]`: the weight of a row at its place among an expert's."""

    combine_REC: torch.Tensor
    empty_RD: torch.Tensor


class EinsumOrder:
    """GShard's one-hot masks (arXiv 2006.16668, algorithm 2): R E C D multiplications each way.

    Without its capacity: C is what the fullest expert needs, so nothing is dropped. Quadratic in
    rows; for few of them, or to check another order.
    """

    def arrange(self, rows: Rows, num_experts: int) -> tuple[ByExpert, Masks]:
        """Places by a running count over rows."""
        wide = torch.promote_types(rows.hidden.dtype, torch.float32)
        chosen_RKE = _one_hot(rows.index, num_experts)
        is_RE = chosen_RKE.sum(1)
        place_RE = is_RE.cumsum(0) - 1
        counts = is_RE.sum(0).tolist()  # sync: the host must know which experts have rows
        place_REC = _one_hot(place_RE.masked_fill(is_RE == 0, max(counts)), max(counts))
        weight_RE = torch.einsum("rke,rk->re", chosen_RKE.to(wide), rows.weights.to(wide))
        x_ECD = torch.einsum("rec,rd->ecd", place_REC.to(wide), rows.hidden.to(wide))
        x_ECD = x_ECD.to(rows.hidden.dtype)
        found = {e: x_ECD[e, :count] for e, count in enumerate(counts) if count}
        return found, Masks(weight_RE.unsqueeze(2) * place_REC.to(wide), _no_sums(rows))

    def restore(self, outputs: ByExpert, state: Masks) -> torch.Tensor:
        """One product with the masks."""
        total_RD = torch.zeros_like(state.empty_RD, memory_format=torch.contiguous_format)
        for expert, y_nD in outputs.items():
            mask_Rn = state.combine_REC[:, expert, : len(y_nD)]
            total_RD += mask_Rn @ y_nD.to(mask_Rn.dtype)
        return total_RD


def _one_hot(index: torch.Tensor, size: int) -> torch.Tensor:
    """`[..., size]` int64; an id of `size` is all zeros."""
    return (index.unsqueeze(-1) == torch.arange(size, device=index.device)).long()


def _no_sums(rows: Rows) -> torch.Tensor:
    """Shape, device and dtype of the sums, without memory for them."""
    wide = torch.promote_types(rows.hidden.dtype, torch.float32)
    return rows.hidden.new_empty(1, dtype=wide).expand(rows.hidden.shape)
