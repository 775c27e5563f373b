"""Decides, by trying, whether faster code equals a family's own experts forward bit for bit."""

import copy
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from moe_runtime.engine import Weights
from moe_runtime.integrations.transformers.experts import reference_forward
from moe_runtime.integrations.transformers.in_memory import InMemory
from moe_runtime.kernels.cpu.gemv import CpuGemv
from moe_runtime.layer import (
    Accumulator,
    Dispatch,
    ExpertMath,
    RowKernel,
    RowProduct,
    run_experts,
)

_NUM_EXPERTS = 4
_TOP_K = 3  # a sum of two rounds the same in float32 as in bfloat16: only a third tells them apart
_NUM_TOKENS = 8
_FFN = 32


class Prover:
    """Finds the fastest proven way to compute experts modules; remembers trials of equal shapes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._gemv = CpuGemv.load() if device.type == "cpu" else None
        self._products: dict[tuple[int, int], RowProduct | None] = {}

    def prove(self, module: nn.Module, dtype: torch.dtype) -> ExpertMath | None:
        """What reproduces `module`'s eager forward exactly, or None if nothing of ours does.

        `module` is a fused experts module that still has its (perhaps meta) parameters.
        """
        math = prove_math(module, dtype, self._device)
        return None if math is None else replace(math, row_kernel=self._rows(module, math, dtype))

    def _rows(self, module: nn.Module, math: ExpertMath, dtype: torch.dtype) -> RowKernel | None:
        if self._gemv is None or dtype != torch.bfloat16 or math.is_transposed or math.has_bias:
            return None
        up = self._product(self._gemv, tuple(module.get_parameter(math.up_name).shape[1:]))
        down = self._product(self._gemv, tuple(module.get_parameter("down_proj").shape[1:]))
        if up is None or down is None or not _rows_are_independent(module, math, dtype):
            return None
        return RowKernel(up, down, torch.get_num_threads())

    def _product(self, gemv: CpuGemv, shape: tuple[int, ...]) -> RowProduct | None:
        num_rows, num_columns = shape
        if (num_rows, num_columns) not in self._products:
            k_block = gemv.find_k_block(num_rows, num_columns)
            self._products[num_rows, num_columns] = (
                None if k_block is None else partial(gemv.run, k_block=k_block)
            )
        return self._products[num_rows, num_columns]


def prove_math(module: nn.Module, dtype: torch.dtype, device: torch.device) -> ExpertMath | None:
    """An ExpertMath that reproduces `module`'s eager forward exactly, or None if none does.

    `module` is a fused experts module that still has its (meta) parameters. A copy of it with a few
    small random experts runs both ways, for router weights in float32 and in `dtype`: a family that
    computes differently (its own casts, sums or clamps) is caught here, with no list of families,
    and then runs its own forward.
    """
    for accumulator in Accumulator:
        math = expert_math(module, accumulator)
        if math is not None and _agrees(module, math, dtype, device):
            return math
    return None


def expert_math(module: nn.Module, accumulator: Accumulator) -> ExpertMath | None:
    """The maths that the flags of `module` describe."""
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    names = {name for name, _ in module.named_parameters(recurse=False)}
    wanted = {up_name, "down_proj"}
    if module.has_bias:
        wanted |= {f"{name}_bias" for name in wanted}
    if names != wanted:
        return None
    return ExpertMath(
        up_name=up_name,
        has_bias=bool(module.has_bias),
        is_transposed=bool(module.is_transposed),
        apply_gate=module._apply_gate if module.has_gate else module.act_fn,  # type: ignore[arg-type]
        post_norm=module.post_expert_norm if module.has_post_expert_norm else None,  # type: ignore[arg-type]
        accumulator=accumulator,
    )


def _agrees(module: nn.Module, math: ExpertMath, dtype: torch.dtype, device: torch.device) -> bool:
    generator = torch.Generator().manual_seed(0)
    small, weights = small_copy(module, dtype, generator, device)
    math = expert_math(small, math.accumulator) or math
    hidden_dim = weights[0]["down_proj"].shape[0 if not math.is_transposed else 1]
    hidden = torch.randn(_NUM_TOKENS, hidden_dim, generator=generator).to(device, dtype)
    index = torch.stack(
        [torch.randperm(_NUM_EXPERTS, generator=generator)[:_TOP_K] for _ in range(_NUM_TOKENS)]
    ).to(device)
    routing = torch.rand(_NUM_TOKENS, _TOP_K, generator=generator).to(device)
    access = InMemory(weights)
    with torch.no_grad():
        for router_dtype in {torch.float32, dtype}:
            scores = routing.to(router_dtype)
            expected = reference_forward(type(module))(small, hidden, index, scores)
            dispatch = Dispatch.of(index, scores, _NUM_EXPERTS)
            if not torch.equal(run_experts(math, hidden, dispatch, access), expected):
                return False
    return True


def _rows_are_independent(module: nn.Module, math: ExpertMath, dtype: torch.dtype) -> bool:
    """Whether gate and norm give a row the same bits alone and among others."""
    generator = torch.Generator().manual_seed(0)
    small, _ = small_copy(module, dtype, generator, torch.device("cpu"))
    small_math = expert_math(small, math.accumulator)
    assert small_math is not None
    up_dim, hidden_dim = (
        module.get_parameter(name).shape[1] for name in (math.up_name, "down_proj")
    )
    steps = [(small_math.apply_gate, up_dim), (small_math.post_norm, hidden_dim)]
    with torch.no_grad():
        for step, length in steps:
            rows = torch.randn(3, length, generator=generator).to(dtype)
            if step is not None and not torch.equal(
                step(rows), torch.cat([step(row) for row in torch.split(rows, 1)])
            ):
                return False
    return True


def small_copy(
    module: nn.Module, dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> tuple[nn.Module, list[Weights]]:
    """`module` with a few experts of a narrow ffn and random numbers, and their weights."""
    small = copy.copy(module)
    small._parameters = {}
    small._modules = {
        name: _real(child, generator, device) for name, child in module.named_children()
    }
    small.__dict__["num_experts"] = _NUM_EXPERTS
    for name, parameter in module.named_parameters(recurse=False):
        shape = list(parameter.shape)
        shape[0] = _NUM_EXPERTS
        # The ffn dimension is the output of gate|up (its last in a bias) and the input of down.
        is_output = name != "down_proj"
        if name != "down_proj_bias":
            at = -1 if parameter.dim() == 2 or is_output == bool(module.is_transposed) else -2
            shape[at] = min(shape[at], _FFN * (2 if module.has_gate and is_output else 1))
        values = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        small._parameters[name] = nn.Parameter(values.to(device, dtype), requires_grad=False)
    weights: list[Weights] = [
        {name: p[expert] for name, p in small._parameters.items() if p is not None}
        for expert in range(_NUM_EXPERTS)
    ]
    return small, weights


def _real(child: nn.Module, generator: torch.Generator, device: torch.device) -> nn.Module:
    """`child` on `device`, with random numbers if it is still on the meta device."""
    tensors = (*child.parameters(), *child.buffers())
    if not any(tensor.is_meta for tensor in tensors):
        is_there = all(tensor.device == device for tensor in tensors)
        return child if is_there else copy.deepcopy(child).to(device)
    child = copy.deepcopy(child).to_empty(device="cpu")
    for tensor in (*child.parameters(), *child.buffers()):
        nn.init.uniform_(tensor, 0.5, 1.5, generator=generator)
    return child.to(device)
