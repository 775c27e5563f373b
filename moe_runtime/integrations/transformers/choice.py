"""Chooses what computes each experts module: proven exact code, or a kernel that rounds less."""

from collections.abc import Iterable, Mapping

import torch

from moe_runtime.fast_layer import FastMath
from moe_runtime.integrations.transformers.fast import fast_math
from moe_runtime.integrations.transformers.proof import Prover, prove_math
from moe_runtime.integrations.transformers.sites import ExpertSite
from moe_runtime.integrations.transformers.tiered_maths import choose_tiered_maths
from moe_runtime.layer import LayerMath
from moe_runtime.tiered_math import TieredMath


def choose_maths(
    sites: Iterable[ExpertSite],
    dtypes: Mapping[str, torch.dtype],
    device: torch.device,
    *,
    exact: bool,
) -> list[LayerMath | TieredMath | None]:
    """What computes each site; None for the family's own forward, and for a list of modules.

    `dtypes` is by full tensor name. Whatever is not `exact` was still shown to compute the same
    function: its flags reproduce the family's own forward in every bit where torch multiplies.
    """
    if device.type != "cpu":
        return [*choose_tiered_maths(sites, dtypes, device, exact=exact)]
    prover = Prover(device)
    maths: list[LayerMath | TieredMath | None] = []
    for site in sites:
        if not site.is_fused:
            maths.append(None)
            continue
        dtype = dtypes[site.tensor_names("down_proj")[0]]
        if exact:
            maths.append(prover.prove(site.module, dtype))
            continue
        math = prove_math(site.module, dtype, device)
        maths.append(None if math is None else fast_math(site.module, math, dtype, device))
    return maths


def computes_compact(maths: Iterable[LayerMath | TieredMath | None]) -> bool:
    """Whether every layer's experts are computed from packed and quantised rows as they are."""
    return all(isinstance(math, FastMath) for math in maths)
