"""Where in a model routing can be seen: its experts, and the routers beside them."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from moe_runtime.errors import UnsupportedModelError
from moe_runtime.integrations.transformers.handle import sites_of
from moe_runtime.integrations.transformers.sites import ExpertSite


def fused_sites(model: nn.Module) -> list[ExpertSite]:
    """The MoE layers, offloaded or not, in the order of an ExpertKey's layers."""
    sites = sites_of(model)
    for site in sites:
        if not site.is_fused:
            raise UnsupportedModelError(
                f"{site.name} is a list of modules, which do not see what the router chose; "
                "routing is recorded for models whose experts are fused, as in transformers 5"
            )
    return sites


def layer_ids(sites: Sequence[ExpertSite]) -> list[int]:
    """The number of the decoder layer in each site's name."""
    numbers = [re.findall(r"(?<=\.)\d+(?=\.)", f".{site.name}.") for site in sites]
    ids = [int(found[0]) if found else -1 for found in numbers]
    is_ascending = ids[0] >= 0 and all(np.diff(ids) > 0)
    return ids if is_ascending else list(range(len(sites)))


def num_hidden_layers(model: nn.Module, sites: Sequence[ExpertSite]) -> int:
    config: Any = getattr(model, "config", None)
    written = 0 if config is None else getattr(config.get_text_config(), "num_hidden_layers", 0)
    return max(int(written), layer_ids(sites)[-1] + 1)
