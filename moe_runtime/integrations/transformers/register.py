"""`experts_implementation="moe_runtime"` of transformers: models whose experts are in memory."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from moe_runtime.engine import Weights
from moe_runtime.fast_layer import LEAST_KERNEL_ROWS, FastMath
from moe_runtime.integrations.transformers.ep_implementation import register_ep_implementation
from moe_runtime.integrations.transformers.experts import reference_forward
from moe_runtime.integrations.transformers.fast import fast_math
from moe_runtime.integrations.transformers.in_memory import InMemory
from moe_runtime.integrations.transformers.proof import expert_math
from moe_runtime.integrations.transformers.tiered_maths import find_grouped
from moe_runtime.layer import Accumulator, Dispatch, ExpertMath
from moe_runtime.tiered_math import GroupedKernel

logger = logging.getLogger("moe_runtime")

NAME = "moe_runtime"
_FALLBACK = "grouped_mm"
_GROUPED_MM_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def register() -> None:
    """Make `from_pretrained(..., experts_implementation="moe_runtime")` work. May be called twice.

    On a GPU Triton computes experts from the model's own fused parameters, and the host waits for
    nothing. On CPU a kernel computes them for a few tokens, and grouped_mm for many. Where the
    kernels cannot (on CPU transposed weights, biases and norms behind experts; training; another
    device), a layer runs grouped_mm, which is logged once for each reason. `experts_path(model)`
    names what runs.
    Where transformers has the seam (5.23 does), `DistributedConfig(ep_implementation=
    "moe_runtime")` works too.
    """
    ALL_EXPERTS_FUNCTIONS.register(NAME, ResidentExperts())
    register_ep_implementation(NAME)


def experts_path(model: nn.Module) -> str:
    """What computes the experts of a model loaded with `experts_implementation="moe_runtime"`."""
    paths = {
        _plan(module).path: None for module in model.modules() if hasattr(module, "is_concatenated")
    }
    return "; ".join(paths) or "no experts"


@dataclass(frozen=True, slots=True)
class _Plan:
    """How one experts module computes: `math` or `grouped` over its parameters, or a fallback."""

    path: str
    place: tuple[int, int]  # addresses of both parameters
    math: FastMath | None = None
    weights: Sequence[Weights] = ()
    grouped: "_Grouped | None" = None


@dataclass(frozen=True, slots=True)
class _Grouped:
    """Grouped products over fused parameters, of which expert e is row e."""

    kernel: GroupedKernel
    stacked: Weights
    slots_E: torch.Tensor


class ResidentExperts:
    """The experts function that transformers calls; remembers what it found out about modules."""

    def __init__(self) -> None:
        self._plans: WeakKeyDictionary[nn.Module, _Plan] = WeakKeyDictionary()
        self._said: set[str] = set()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(
        self,
        module: Any,
        hidden_TD: torch.Tensor,
        top_k_index_TK: torch.Tensor,
        top_k_weights_TK: torch.Tensor,
    ) -> torch.Tensor:
        plan = self._plan(module)
        inputs = hidden_TD, top_k_index_TK, top_k_weights_TK
        can_run = hidden_TD.dtype == module.down_proj.dtype and not (
            torch.is_grad_enabled()
            and any(t.requires_grad for t in (hidden_TD, top_k_weights_TK, module.down_proj))
        )
        if can_run and plan.grouped is not None:
            grouped = plan.grouped
            return grouped.kernel.run(*inputs, grouped.stacked, grouped.slots_E)[0]
        num_rows = top_k_index_TK.numel()
        if not can_run or plan.math is None or num_rows > LEAST_KERNEL_ROWS * module.num_experts:
            # torch's grouped_mm knows no others; the family's own forward knows all.
            has_grouped_mm = module.down_proj.dtype in _GROUPED_MM_DTYPES
            forward = grouped_mm_experts_forward if has_grouped_mm else _own_forward
            output: torch.Tensor = forward(module, *inputs)
            return output
        dispatch = Dispatch.of(top_k_index_TK, top_k_weights_TK, len(plan.weights))
        if not dispatch.experts:
            return torch.zeros_like(hidden_TD)
        return plan.math.run(hidden_TD, dispatch, InMemory(plan.weights))

    def _plan(self, module: nn.Module) -> _Plan:
        found = self._plans.get(module)
        if found is None or found.place != _place(module):
            found = self._plans[module] = _plan(module)
            if found.path not in self._said:
                self._said.add(found.path)
                logger.info("experts of %s: %s", type(module).__name__, found.path)
        return found


def _own_forward(module: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    return reference_forward(type(module))(module, *inputs)


def _place(module: Any) -> tuple[int, int]:
    up = module.gate_up_proj if module.has_gate else module.up_proj
    return up.data_ptr(), module.down_proj.data_ptr()


def _plan(module: nn.Module) -> _Plan:
    math = expert_math(module, Accumulator.FLOAT32)
    down: Any = module.down_proj
    if math is None:
        return _Plan(f"{_FALLBACK} (parameters of other names)", _place(module))
    if down.device.type == "cuda":
        return _grouped_plan(module, math)
    chosen = fast_math(module, math, down.dtype, down.device)
    if not isinstance(chosen, FastMath):
        return _Plan(_fallback(down.dtype, chosen.reason), _place(module))
    parameters = {name: module.get_parameter(name).detach() for name in (math.up_name, "down_proj")}
    if not all(value.is_contiguous() for value in parameters.values()):
        return _Plan(f"{_FALLBACK} (weights that are not contiguous)", _place(module))
    views = {name: value.unbind(0) for name, value in parameters.items()}
    weights = [{name: views[name][e] for name in views} for e in range(len(down))]
    return _Plan(chosen.path, _place(module), math=chosen, weights=weights)


def _grouped_plan(module: nn.Module, math: ExpertMath) -> _Plan:
    down = module.get_parameter("down_proj")
    kernel = find_grouped(module, math, down.dtype, down.device)
    if isinstance(kernel, str):
        return _Plan(_fallback(down.dtype, kernel), _place(module))
    stacked = {name: value.detach() for name, value in module.named_parameters(recurse=False)}
    slots_E = torch.arange(len(down), dtype=torch.int32, device=down.device)
    return _Plan(kernel.path, _place(module), grouped=_Grouped(kernel, stacked, slots_E))


def _fallback(dtype: torch.dtype, reason: str) -> str:
    return f"{_FALLBACK if dtype in _GROUPED_MM_DTYPES else 'eager'} ({reason})"
