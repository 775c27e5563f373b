"""Chooses what computes each experts module: proven exact code, or a kernel that rounds less."""

import itertools
from collections.abc import Iterable, Mapping, Sequence

import torch

from moe_runtime.fast_layer import FastMath
from moe_runtime.integrations.transformers.fast import fast_math
from moe_runtime.integrations.transformers.proof import Prover, prove_math
from moe_runtime.integrations.transformers.sites import ExpertSite
from moe_runtime.integrations.transformers.tiered_maths import choose_tiered_maths
from moe_runtime.layer import LayerMath
from moe_runtime.memory.tensor_map import LayerExperts
from moe_runtime.tiered_math import TieredMath


def choose_maths(
    sites: Iterable[ExpertSite],
    dtypes: Mapping[str, torch.dtype],
    device: torch.device,
    *,
    exact: bool,
    layers: Sequence[LayerExperts] = (),
) -> list[LayerMath | TieredMath | None]:
    """What computes each site; None for the family's own forward, and for a list of modules.

    `dtypes` is by full tensor name, `layers` what slots will hold of each site. Whatever is not
    `exact` was still shown to compute the same function: its flags reproduce the family's own
    forward in every bit where torch multiplies.
    """
    if device.type != "cpu":
        return [*choose_tiered_maths(sites, dtypes, device, exact=exact)]
    prover = Prover(device)
    maths: list[LayerMath | TieredMath | None] = []
    for site, layer in itertools.zip_longest(sites, layers):
        if not site.is_fused:
            maths.append(None)
            continue
        dtype = dtypes[site.tensor_names("down_proj")[0]]
        if exact:
            maths.append(prover.prove(site.module, dtype))
            continue
        math = prove_math(site.module, dtype, device)
        if math is None:
            maths.append(None)
            continue
        has_rows = layer is not None and layer.has_rows(is_transposed=math.is_transposed)
        maths.append(fast_math(site.module, math, dtype, device, has_rows=has_rows))
    return maths


def computes_compact(
    maths: Iterable[LayerMath | TieredMath | None], layers: Iterable[LayerExperts]
) -> bool:
    """Whether every layer's experts are computed from packed and quantised rows as they are."""
    return all(
        isinstance(math, FastMath) and layer.has_rows(is_transposed=math.torch_math.is_transposed)
        for math, layer in zip(maths, layers, strict=True)
    )
