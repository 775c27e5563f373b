"""The experts of one layer in one call of a kernel, fed from slots."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from moe_runtime.kernels.cpu.experts_layer import Biases
from moe_runtime.kernels.cpu.matrix import Weight
from moe_runtime.layer import MAX_HELD_BYTES, Dispatch, ExpertAccess, ExpertMath, run_experts
from moe_runtime.memory.compact_views import CompactWeights

# T tokens, D model dim, R rows of all experts, n of one

# Rows of one expert that the kernel takes in any case, as it reads each weight once.
LEAST_KERNEL_ROWS = 16
# Torch's blocked products win with more rows, the sooner the larger the expert: in turns on two
# cores in bfloat16, from 12 rows on with 18.9 million weights, 40 with 6.3, 72 with 2.8, 110 with
# 1.6 and 190 with 0.08.
_MOST_KERNEL_ROWS = 128
_MOST_ROW_WEIGHTS = 200_000_000


class KernelStep(Protocol):
    """Rows of one layer under way: each expert once, in any order, then their weighted sum."""

    def run(
        self,
        up: Sequence[Weight],
        down: Sequence[Weight],
        rows: Sequence[tuple[int, int]],
        *,
        biases: Biases = (),
        is_last: bool,
    ) -> torch.Tensor | None:
        """Compute experts; with `is_last` all other rows are there, and the sum is returned."""

    def put(self, begin: int, y_nD: torch.Tensor) -> None:
        """Rows from `begin` on that were computed elsewhere, not weighted."""

    def sum(self) -> torch.Tensor:
        """`[T, D]`, each token's rows added up in the order of rows."""


# `hidden_TD`, `token_R` int64 and `weight_R` float32 `[R]`: a step of these rows.
BeginStep = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], KernelStep]


def most_kernel_rows(num_weights: int) -> int:
    """Rows up to which the kernel takes an expert of so many weights."""
    return max(LEAST_KERNEL_ROWS, min(_MOST_KERNEL_ROWS, _MOST_ROW_WEIGHTS // num_weights))


@dataclass(frozen=True, slots=True)
class FastMath:
    """What computes a layer with another rounding than the reference, and fewer of them.

    Bits depend on the tokens and the experts they use; not on what was cached, nor on the order in
    which experts arrive. `torch_math` takes experts of more than `most_rows`, and prompts whose
    outputs are too many to hold. `path` names the kernel in reports.
    """

    begin: BeginStep
    torch_math: ExpertMath
    path: str
    most_rows: int

    def run(
        self, hidden_TD: torch.Tensor, dispatch: Dispatch, access: ExpertAccess
    ) -> torch.Tensor:
        """Sum of weighted expert outputs, `[T, D]` in the dtype of `hidden_TD`."""
        num_rows = dispatch.bounds[-1]
        if num_rows * hidden_TD.shape[1] * torch.float32.itemsize > MAX_HELD_BYTES:
            return run_experts(self.torch_math, hidden_TD, dispatch, access)
        hidden_TD = hidden_TD.contiguous()
        step = self.begin(
            hidden_TD,
            dispatch.token_R[:num_rows],
            dispatch.weight_R1[:num_rows].squeeze(1).float(),
        )
        pending = list(range(len(dispatch.experts)))
        output = None
        while pending:
            ready = [i for i in pending if access.is_ready(dispatch.experts[i])]
            group = ready[: access.max_together] or pending[:1]
            pending = [i for i in pending if i not in group]
            is_last = not pending
            output = self._run_group(step, hidden_TD, dispatch, access, group, is_last=is_last)
        assert output is not None
        return output

    def _run_group(
        self,
        step: KernelStep,
        hidden_TD: torch.Tensor,
        dispatch: Dispatch,
        access: ExpertAccess,
        group: list[int],
        *,
        is_last: bool,
    ) -> torch.Tensor | None:
        """Compute the experts of `group`, which are released; the layer's output if `is_last`."""
        few: list[tuple[int, int]] = []
        up: list[Weight] = []
        down: list[Weight] = []
        biases: list[tuple[torch.Tensor, torch.Tensor]] = []
        math = self.torch_math
        for i in group:
            weights = access.weights(dispatch.experts[i])
            is_compact = isinstance(weights, CompactWeights)
            if dispatch.num_rows(i) > self.most_rows or (math.is_transposed and not is_compact):
                x_nD = hidden_TD[dispatch.token_R[dispatch.rows(i)]]
                step.put(dispatch.bounds[i], math(x_nD, weights))
                continue
            few.append((dispatch.bounds[i], dispatch.bounds[i + 1]))
            matrices: Mapping[str, Weight] = weights
            if isinstance(weights, CompactWeights):
                matrices = weights.matrices
            up.append(matrices[math.up_name])
            down.append(matrices["down_proj"])
            if math.has_bias:
                of_up, of_down = matrices[f"{math.up_name}_bias"], matrices["down_proj_bias"]
                assert isinstance(of_up, torch.Tensor)
                assert isinstance(of_down, torch.Tensor)
                biases.append((of_up, of_down))
        output = None
        if few:
            output = step.run(up, down, few, biases=biases, is_last=is_last)
        elif is_last:
            output = step.sum()
        for i in group:
            access.release(dispatch.experts[i])
        return output
