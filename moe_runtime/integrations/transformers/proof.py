"""Decides, by trying, whether the fast loop equals a family's own experts forward bit for bit."""

import copy

import torch
from torch import nn

from moe_runtime.engine import Weights
from moe_runtime.integrations.transformers.experts import reference_forward
from moe_runtime.layer import Accumulator, Dispatch, ExpertMath, run_experts

_NUM_EXPERTS = 3
_NUM_TOKENS = 6
_FFN = 32


def prove_math(module: nn.Module, dtype: torch.dtype) -> ExpertMath | None:
    """An ExpertMath that reproduces `module`'s eager forward exactly, or None if none does.

    `module` is a fused experts module that still has its (meta) parameters. A copy of it with a few
    small random experts runs both ways, for router weights in float32 and in `dtype`: a family that
    computes differently (its own casts, sums or clamps) is caught here, with no list of families,
    and then runs its own forward.
    """
    for accumulator in Accumulator:
        math = expert_math(module, accumulator)
        if math is not None and _agrees(module, math, dtype):
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


def _agrees(module: nn.Module, math: ExpertMath, dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)
    small, weights = _small_copy(module, dtype, generator)
    if small is None:
        return False
    math = expert_math(small, math.accumulator) or math
    hidden_dim = weights[0]["down_proj"].shape[0 if not math.is_transposed else 1]
    hidden = torch.randn(_NUM_TOKENS, hidden_dim, generator=generator).to(dtype)
    index = torch.stack(
        [torch.randperm(_NUM_EXPERTS, generator=generator)[:2] for _ in range(_NUM_TOKENS)]
    )
    routing = torch.rand(_NUM_TOKENS, 2, generator=generator)
    access = _InMemory(weights)
    with torch.no_grad():
        for router_dtype in {torch.float32, dtype}:
            scores = routing.to(router_dtype)
            expected = reference_forward(type(module))(small, hidden, index, scores)
            dispatch = Dispatch.of(index, scores, _NUM_EXPERTS)
            if not torch.equal(run_experts(math, hidden, dispatch, access), expected):
                return False
    return True


def _small_copy(
    module: nn.Module, dtype: torch.dtype, generator: torch.Generator
) -> tuple[nn.Module | None, list[Weights]]:
    """`module` with a few experts of a narrow ffn and real numbers; None if it cannot be made."""
    small = copy.copy(module)
    small._parameters = {}
    small._modules = dict(module._modules)
    small.num_experts = _NUM_EXPERTS
    up = "gate_up_proj" if module.has_gate else "up_proj"
    ffn = min(_FFN, module.down_proj.shape[1 if module.is_transposed else 2])  # type: ignore[index, union-attr]
    narrow = {up: 2 * ffn if module.has_gate else ffn, f"{up}_bias": 2 * ffn}
    if not module.has_gate:
        narrow[f"{up}_bias"] = ffn
    for name, parameter in module.named_parameters(recurse=False):
        shape = list(parameter.shape)
        shape[0] = _NUM_EXPERTS
        if name in narrow:
            shape[2 if module.is_transposed and parameter.dim() == 3 else 1] = narrow[name]
        elif name == "down_proj":
            shape[1 if module.is_transposed else 2] = ffn
        scale = shape[-1] ** -0.5
        values = torch.randn(shape, generator=generator) * scale
        small._parameters[name] = nn.Parameter(values.to(dtype), requires_grad=False)
    for name, child in module._modules.items():
        if child is not None and any(t.is_meta for t in (*child.parameters(), *child.buffers())):
            child = copy.deepcopy(child).to_empty(device="cpu")
            for tensor in (*child.parameters(), *child.buffers()):
                nn.init.uniform_(tensor, 0.5, 1.5, generator=generator)
            small._modules[name] = child
    weights = [
        {name: p[expert] for name, p in small._parameters.items() if p is not None}
        for expert in range(_NUM_EXPERTS)
    ]
    return small, weights


class _InMemory:
    """Experts that are simply there."""

    def __init__(self, weights: list[Weights]) -> None:
        self._weights = weights

    def is_ready(self, expert: int) -> bool:
        return True

    def weights(self, expert: int) -> Weights:
        return self._weights[expert]

    def release(self, expert: int) -> None:
        """Nothing to free."""
