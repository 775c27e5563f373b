"""The routers of a model: where they stand, and the numbers by which they choose.

E experts a layer, D model dim.
"""

from typing import Any

import numpy as np
import torch
from torch import nn

from moe_runtime.errors import UnsupportedModelError
from moe_runtime.integrations.transformers.sites import ExpertSite
from moe_runtime.predictors.predictor import Gate
from moe_runtime.trace_fields import Array


def router_beside(model: nn.Module, site: ExpertSite) -> nn.Module:
    """The module beside a site's experts whose output transformers records as router logits.

    Where a family names none, the experts themselves, which see what the router sees.
    """
    recorded = [getattr(m, "_can_record_outputs", None) or {} for m in model.modules()]
    marks = [names["router_logits"] for names in recorded if "router_logits" in names]
    # Families name the class itself, or a recorder of it.
    kinds = [getattr(mark, "target_class", mark) for mark in marks]
    routers = tuple(kind for kind in kinds if isinstance(kind, type))
    block = model.get_submodule(site.name.rpartition(".")[0])
    return next((child for child in block.children() if isinstance(child, routers)), site.module)


def gate_of(router: nn.Module, num_experts: int) -> Gate:
    """The numbers of a router module of transformers: a matrix, and what may come with it."""
    weight = next((p for p in router.parameters() if p.ndim == 2 and len(p) == num_experts), None)
    if weight is None:
        raise UnsupportedModelError(
            f"router {type(router).__name__} has no matrix of {num_experts} rows; predictors that "
            "need gates cannot be used with this model"
        )
    named: dict[str, Any] = {**dict(router.named_parameters()), **dict(router.named_buffers())}
    zeros = np.zeros(num_experts, np.float32)
    bias, selection = named.get("bias"), named.get("e_score_correction_bias")
    return Gate(
        weight=parameter_numbers(weight),
        bias=zeros if bias is None else parameter_numbers(bias),
        selection_bias=zeros if selection is None else parameter_numbers(selection),
        # transformers scores by sigmoid wherever it corrects the choice by such a bias.
        is_sigmoid=selection is not None,
        num_groups=int(getattr(router, "num_group", None) or getattr(router, "n_group", None) or 1),
        groups_used=int(getattr(router, "topk_group", None) or 1),
    )


def parameter_numbers(tensor: torch.Tensor) -> Array:
    """As float32 on the host."""
    found: Array = tensor.detach().float().cpu().numpy()
    return found
