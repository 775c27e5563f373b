"""The experts of one layer as the reference computes them, fed from slots."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
from torch.nn import functional

from moe_runtime.engine import Weights

# T tokens, K top-k, D model dim, F ffn dim, n rows of one expert

# Outputs of experts that arrived early wait here for their turn: enough for any decode step, and a
# bound for prompts, where waiting in order costs little beside the computing.
MAX_HELD_BYTES = 16 * 2**20


class ExpertAccess(Protocol):
    """The experts that one layer uses in one forward."""

    def is_ready(self, expert: int) -> bool:
        """Whether `weights(expert)` would return at once."""

    def weights(self, expert: int) -> Weights:
        """The parameters of `expert`, waiting for them if need be."""

    def release(self, expert: int) -> None:
        """`expert` is used and will not be asked for again."""


class Accumulator(Enum):
    """The dtype in which the reference adds up the experts of a token."""

    HIDDEN = "hidden"
    FLOAT32 = "float32"
    ROUTER = "router"

    def dtype(self, hidden: torch.dtype, router: torch.dtype) -> torch.dtype:
        if self is Accumulator.HIDDEN:
            return hidden
        return router if self is Accumulator.ROUTER else torch.float32


@dataclass(frozen=True, slots=True)
class ExpertMath:
    """What one expert does to its tokens, by the flags of transformers' experts classes.

    `apply_gate` maps gate|up `[n, 2F]` (or up `[n, F]` without a gate) to `[n, F]`; `post_norm`
    runs on the expert's output `[n, D]`.
    """

    up_name: str  # "gate_up_proj" or "up_proj"
    has_bias: bool
    is_transposed: bool
    apply_gate: Callable[[torch.Tensor], torch.Tensor]
    post_norm: Callable[[torch.Tensor], torch.Tensor] | None
    accumulator: Accumulator

    def __call__(self, x_nD: torch.Tensor, weights: Weights) -> torch.Tensor:
        h = self.apply_gate(self._project(x_nD, weights, self.up_name))
        y_nD = self._project(h, weights, "down_proj")
        return y_nD if self.post_norm is None else self.post_norm(y_nD)

    def _project(self, x: torch.Tensor, weights: Weights, name: str) -> torch.Tensor:
        weight = weights[name]
        y = x @ weight if self.is_transposed else functional.linear(x, weight)
        return y + weights[name + "_bias"] if self.has_bias else y


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Which rows go to which expert: rows of expert `experts[i]` are `bounds[i]:bounds[i + 1]`.

    `token` and `weight` are sorted by expert and, within one, by top-k position, then token: the
    order in which the reference gathers rows, which fixes the bits of its matrix products.
    """

    experts: list[int]
    bounds: list[int]
    token_R: torch.Tensor
    weight_R1: torch.Tensor

    @classmethod
    def of(
        cls, top_k_index_TK: torch.Tensor, top_k_weights_TK: torch.Tensor, num_experts: int
    ) -> "Dispatch":
        num_tokens = top_k_index_TK.shape[0]
        expert_R, order_R = torch.sort(top_k_index_TK.t().reshape(-1), stable=True)
        experts, counts = torch.unique_consecutive(expert_R, return_counts=True)
        weight_R1 = top_k_weights_TK.t().reshape(-1)[order_R].unsqueeze(1)
        bounds = [0]
        for count in counts.tolist():  # sync: the experts to read must be known on the host
            bounds.append(bounds[-1] + count)
        # Expert parallelism marks rows of other ranks with `num_experts`, sorted last: no expert.
        names = [expert for expert in experts.tolist() if expert < num_experts]
        return cls(names, bounds, order_R % num_tokens, weight_R1)


def run_experts(
    math: ExpertMath, hidden_TD: torch.Tensor, dispatch: Dispatch, access: ExpertAccess
) -> torch.Tensor:
    """Sum of weighted expert outputs, `[T, D]` in the dtype of `hidden_TD`.

    Experts in slots compute while others are read; outputs are added in ascending order of
    experts, as the reference does, so the bits do not depend on what was cached.
    """
    router_dtype = dispatch.weight_R1.dtype
    total_TD = torch.zeros_like(
        hidden_TD, dtype=math.accumulator.dtype(hidden_TD.dtype, router_dtype)
    )
    held: dict[int, torch.Tensor] = {}
    held_bytes = 0
    turn = 0
    while turn < len(dispatch.experts):
        current = _next_to_run(dispatch, access, turn, held, held_bytes)
        rows = slice(dispatch.bounds[current], dispatch.bounds[current + 1])
        weights = access.weights(dispatch.experts[current])
        y_nD = math(hidden_TD[dispatch.token_R[rows]], weights) * dispatch.weight_R1[rows]
        access.release(dispatch.experts[current])
        held[current] = y_nD.to(total_TD.dtype)
        held_bytes += held[current].nbytes
        while turn in held:
            rows = slice(dispatch.bounds[turn], dispatch.bounds[turn + 1])
            held_bytes -= held[turn].nbytes
            total_TD.index_add_(0, dispatch.token_R[rows], held.pop(turn))
            turn += 1
    return total_TD.to(hidden_TD.dtype)


def _next_to_run(
    dispatch: Dispatch,
    access: ExpertAccess,
    turn: int,
    held: dict[int, torch.Tensor],
    held_bytes: int,
) -> int:
    """The expert whose turn it is, or a later one that is ready while that one is still read."""
    if held_bytes < MAX_HELD_BYTES and not access.is_ready(dispatch.experts[turn]):
        for later in range(turn + 1, len(dispatch.experts)):
            if later not in held and access.is_ready(dispatch.experts[later]):
                return later
    return turn
