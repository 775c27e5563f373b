"""Chooses what computes each experts module whose experts travel to an accelerator."""

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from moe_runtime.integrations.transformers.fast import fast_math
from moe_runtime.integrations.transformers.proof import prove_math
from moe_runtime.integrations.transformers.sites import ExpertSite
from moe_runtime.layer import ExpertMath, LayerMath
from moe_runtime.memory.tensor_map import LayerExperts, TensorMap
from moe_runtime.tiered_math import GroupedKernel, TieredMath

if importlib.util.find_spec("triton") is not None:
    from moe_runtime.integrations.transformers.grouped import grouped_experts, reading_stored


def choose_tiered_maths(
    sites: Iterable[ExpertSite],
    dtypes: Mapping[str, torch.dtype],
    device: torch.device,
    *,
    exact: bool,
) -> list[TieredMath | None]:
    """What computes each site; None for the family's own forward, and for a list of modules.

    `dtypes` is by full tensor name. `exact`: torch alone, on `device` alone, where it was shown to
    have the bits of the family's own forward.
    """
    maths: list[TieredMath | None] = []
    for site in sites:
        math = None
        if site.is_fused:
            dtype = dtypes[site.tensor_names("down_proj")[0]]
            math = prove_math(site.module, dtype, device)
        if math is None:
            maths.append(None)
        elif exact:
            maths.append(TieredMath(torch_math=math, grouped=None, host=None))
        else:
            maths.append(tiered_math(site.module, math, dtype, device))
    return maths


def tiered_math(
    module: nn.Module, math: ExpertMath, dtype: torch.dtype, device: torch.device
) -> TieredMath:
    """Kernels for what `math` computes on `device`, and on the CPU beside it.

    `module` is a fused experts module that still has its (perhaps meta) parameters.
    """
    cpu = torch.device("cpu")
    expert_names = {math.up_name, "down_proj", f"{math.up_name}_bias", "down_proj_bias"}
    tensors = (*module.named_parameters(), *module.named_buffers())
    is_bare = all(name in expert_names for name, _ in tensors)
    host = fast_math(module, math, dtype, cpu) if is_bare else None
    grouped = find_grouped(module, math, dtype, device)
    if isinstance(grouped, str):
        return TieredMath(replace(math, reason=grouped), None, host)
    return TieredMath(math, grouped, host)


def as_stored(
    maths: Sequence[LayerMath | TieredMath | None], tensor_map: TensorMap, device: torch.device
) -> list[LayerMath | TieredMath | None]:
    """`maths` for slots that hold experts as their files do.

    Where the grouped products cannot read them there, torch computes from dequantised ones.
    """
    layers = zip(maths, tensor_map.layers, strict=True)
    return [
        _as_stored(math, layer, device) if isinstance(math, TieredMath) else math
        for math, layer in layers
    ]


def _as_stored(math: TieredMath, layer: LayerExperts, device: torch.device) -> TieredMath:
    if math.grouped is None or layer.scaled is None:
        return math
    grouped = reading_stored(math.grouped, layer, device)
    if isinstance(grouped, str):
        return TieredMath(replace(math.torch_math, reason=grouped), None, math.host)
    return replace(math, grouped=grouped)


def find_grouped(
    module: nn.Module, math: ExpertMath, dtype: torch.dtype, device: torch.device
) -> GroupedKernel | str:
    """The grouped products that compute `math` on `device`, or why there are none."""
    if importlib.util.find_spec("triton") is None:
        return "no triton on this system"
    return grouped_experts(module, math, dtype, device)
