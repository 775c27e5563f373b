"""The experts of one layer as the reference computes them, fed from slots."""

from collections.abc import Callable, Sequence
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

    @property
    def max_together(self) -> int:
        """Experts whose weights may be held at a time."""

    def is_ready(self, expert: int) -> bool:
        """Whether `weights(expert)` would return at once."""

    def weights(self, expert: int) -> Weights:
        """The parameters of `expert`, waiting for them if need be."""

    def release(self, expert: int) -> None:
        """`expert` is used and will not be asked for again."""


class LayerMath(Protocol):
    """What computes one layer's experts; `path` names it in reports."""

    @property
    def path(self) -> str: ...

    def run(
        self, hidden_TD: torch.Tensor, dispatch: "Dispatch", access: ExpertAccess
    ) -> torch.Tensor:
        """Sum of weighted expert outputs, `[T, D]` in the dtype of `hidden_TD`."""


class Accumulator(Enum):
    """The dtype in which the reference adds up the experts of a token."""

    HIDDEN = "hidden"
    FLOAT32 = "float32"
    ROUTER = "router"

    def dtype(self, hidden: torch.dtype, router: torch.dtype) -> torch.dtype:
        if self is Accumulator.HIDDEN:
            return hidden
        return router if self is Accumulator.ROUTER else torch.float32


# `weights[i] @ x[i]` for k weights `[N, K]` and k rows `[k, K]` (or one shared `[1, K]`): `[k, N]`.
RowProduct = Callable[[Sequence[torch.Tensor], torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class RowKernel:
    """Products of one row with each of several experts, bit-equal to `functional.linear`.

    Holds for `num_threads` threads of torch, the number that it was proven with.
    """

    up: RowProduct
    down: RowProduct
    num_threads: int


@dataclass(frozen=True, slots=True)
class ExpertMath:
    """What one expert does to its tokens, by the flags of transformers' experts classes.

    `apply_gate` maps gate|up `[n, 2F]` (or up `[n, F]` without a gate) to `[n, F]`; `post_norm`
    runs on the expert's output `[n, D]`. With a `row_kernel`, experts that have one row each are
    computed together.
    """

    up_name: str  # "gate_up_proj" or "up_proj"
    has_bias: bool
    is_transposed: bool
    apply_gate: Callable[[torch.Tensor], torch.Tensor]
    post_norm: Callable[[torch.Tensor], torch.Tensor] | None
    accumulator: Accumulator
    row_kernel: RowKernel | None = None
    reason: str = ""  # why no kernel computes this, for reports

    def __call__(self, x_nD: torch.Tensor, weights: Weights) -> torch.Tensor:
        h = self.apply_gate(self._project(x_nD, weights, self.up_name))
        y_nD = self._project(h, weights, "down_proj")
        return y_nD if self.post_norm is None else self.post_norm(y_nD)

    @property
    def path(self) -> str:
        """What computes, as reports name it."""
        if self.row_kernel is not None:
            return "avx512-bf16 gemv for single rows, torch"
        return f"torch ({self.reason})" if self.reason else "torch"

    def run(
        self, hidden_TD: torch.Tensor, dispatch: "Dispatch", access: ExpertAccess
    ) -> torch.Tensor:
        """`run_experts` with this."""
        return run_experts(self, hidden_TD, dispatch, access)

    def rows(
        self, kernel: RowKernel, x_kD: torch.Tensor, weights: Sequence[Weights]
    ) -> torch.Tensor:
        """Row `i` through expert `i`: `[k, D]`. A single row is shared by all."""
        h_kF = self.apply_gate(kernel.up([w[self.up_name] for w in weights], x_kD))
        y_kD = kernel.down([w["down_proj"] for w in weights], h_kF)
        return y_kD if self.post_norm is None else self.post_norm(y_kD)

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
        weight_R1 = top_k_weights_TK.t().reshape(-1)[order_R].unsqueeze(1)
        experts: list[int] = []
        bounds = [0]
        for row, expert in enumerate(expert_R.tolist()):  # sync: the host must know what to read
            # Expert parallelism marks rows of other ranks with `num_experts`, sorted last.
            if expert >= num_experts:
                break
            if experts and experts[-1] == expert:
                bounds[-1] = row + 1
            else:
                experts.append(expert)
                bounds.append(row + 1)
        token_R = order_R % num_tokens if num_tokens > 1 else torch.zeros_like(order_R)
        return cls(experts, bounds, token_R, weight_R1)

    def num_rows(self, i: int) -> int:
        """Rows of expert `experts[i]`."""
        return self.bounds[i + 1] - self.bounds[i]

    def rows(self, i: int) -> slice:
        """Where the rows of expert `experts[i]` are."""
        return slice(self.bounds[i], self.bounds[i + 1])


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
    kernel = math.row_kernel
    if kernel is not None and kernel.num_threads != torch.get_num_threads():
        kernel = None  # the proof of equal bits was for another number of threads
    pending = list(range(len(dispatch.experts)))  # not computed, in order of experts
    held: dict[int, torch.Tensor] = {}  # computed before their turn
    held_bytes = 0
    turn = 0
    while pending:
        group = _next_group(dispatch, access, pending, held_bytes, kernel is not None)
        for i, y_nD in _compute(math, kernel, hidden_TD, dispatch, access, group):
            held[i] = (y_nD * dispatch.weight_R1[dispatch.rows(i)]).to(total_TD.dtype)
            held_bytes += held[i].nbytes
            pending.remove(i)
        while turn in held:
            y_nD = held.pop(turn)
            held_bytes -= y_nD.nbytes
            total_TD.index_add_(0, dispatch.token_R[dispatch.rows(turn)], y_nD)
            turn += 1
    return total_TD.to(hidden_TD.dtype)


def _compute(
    math: ExpertMath,
    kernel: RowKernel | None,
    hidden_TD: torch.Tensor,
    dispatch: Dispatch,
    access: ExpertAccess,
    group: list[int],
) -> list[tuple[int, torch.Tensor]]:
    """Unweighted outputs of the experts of `group`, which are released."""
    weights = [access.weights(dispatch.experts[i]) for i in group]
    if kernel is not None and all(dispatch.num_rows(i) == 1 for i in group):
        first_rows = [dispatch.bounds[i] for i in group]
        x_kD = hidden_TD if len(hidden_TD) == 1 else hidden_TD[dispatch.token_R[first_rows]]
        y_kD = math.rows(kernel, x_kD, weights)
        outputs = [(i, y_kD[n : n + 1]) for n, i in enumerate(group)]
    else:
        outputs = [
            (i, math(hidden_TD[dispatch.token_R[dispatch.rows(i)]], w))
            for i, w in zip(group, weights, strict=True)
        ]
    for i in group:
        access.release(dispatch.experts[i])
    return outputs


def _next_group(
    dispatch: Dispatch,
    access: ExpertAccess,
    pending: list[int],
    held_bytes: int,
    can_join: bool,
) -> list[int]:
    """The expert whose turn it is, or later ones that are ready while that one is still read.

    With `can_join`, all ready experts that have one row each go together.
    """
    turn = pending[0]
    if held_bytes >= MAX_HELD_BYTES:
        return [turn]
    if not can_join and access.is_ready(dispatch.experts[turn]):
        return [turn]
    ready = [i for i in pending if access.is_ready(dispatch.experts[i])]
    if not ready:
        return [turn]
    if not can_join or dispatch.num_rows(ready[0]) > 1:
        return ready[:1]
    return [i for i in ready if dispatch.num_rows(i) == 1][: access.max_together]
