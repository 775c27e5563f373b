"""How many decoder layers have their dense matrices in memory, and where the others lie."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moe_runtime.errors import BudgetError, UnsupportedModelError
from moe_runtime.expert_memory import ExpertMemory, format_bytes
from moe_runtime.integrations.transformers.conversion import assemble
from moe_runtime.integrations.transformers.install import loaded_phase
from moe_runtime.integrations.transformers.layer_window import WindowPlan
from moe_runtime.integrations.transformers.sites import ExpertSite
from moe_runtime.integrations.transformers.survey import Survey, load_dtypes
from moe_runtime.memory.assembly import Assembly, stack
from moe_runtime.memory.checkpoint import Checkpoint
from moe_runtime.memory.layout import ALIGNMENT_BYTES, ExpertLayout
from moe_runtime.memory.scaled_layer import is_scaled
from moe_runtime.memory.tensor_map import LayerExperts, TensorMap

_LEAST_LAYERS = 2  # one computes, the next one is read


def parse_dense_memory(value: str | int | float) -> ExpertMemory:
    """A size, a share of the dense weights, or 'auto'. Raises BudgetError."""
    try:
        return ExpertMemory.parse(value)
    except BudgetError as error:
        raise BudgetError(str(error).replace("expert_memory", "dense_memory")) from None


def plan_window(
    memory: ExpertMemory,
    found: Survey,
    load_config: Any,
    checkpoint: Checkpoint,
    *,
    dense_bytes: int,
    free_bytes: int,
    exact: bool,
) -> WindowPlan | None:
    """The layers that fit in `memory`, or None where all do; under 'auto' it is `free_bytes`.

    `dense_bytes` are those of all dense weights that would be in memory. Raises BudgetError, with
    the smallest budget that works, and UnsupportedModelError where layers cannot be read in place.
    """
    budget_bytes = memory.resolve(expert_total_bytes=dense_bytes, available_bytes=free_bytes)
    if budget_bytes >= dense_bytes:
        return None
    modules = _decoder_layers(found.model, found.sites)
    matrices = list(_matrices(found, modules))
    names = [name for of in matrices for name in of.values()]
    if not all(matrices):
        raise UnsupportedModelError(
            f"{type(found.model).__name__} shares the weights of its layers, so that they stay in "
            "memory; leave dense_memory out"
        )
    places, dense_names = assemble(
        found.model, load_config.weight_mapping or [], checkpoint, [*found.dtypes, *names]
    )
    if any(is_scaled(places[name]) for name in names):
        raise UnsupportedModelError(
            "dense weights in fp8 are dequantised while they load and cannot be read layer by "
            "layer; leave dense_memory out, or use a bfloat16 checkpoint"
        )
    dtypes = load_dtypes(found.model, names, load_config.dtype_plan or {})
    tensor_map = TensorMap([_layer(found.model, of, dtypes, places) for of in matrices])
    if not exact:
        tensor_map = tensor_map.beside_blocks()
    weight_bytes = sum(layer.layout.weight_bytes for layer in tensor_map.layers)
    layer_bytes = tensor_map.slot_bytes
    others_bytes = dense_bytes - weight_bytes
    floor_bytes = others_bytes + _LEAST_LAYERS * layer_bytes
    if budget_bytes < floor_bytes or len(modules) <= _LEAST_LAYERS:
        if memory == ExpertMemory():
            return None  # whoever plans experts says what is missing for both
        raise BudgetError(
            f"{format_bytes(max(budget_bytes, 0))} for dense weights of "
            f"{format_bytes(dense_bytes)} is below the floor of {format_bytes(floor_bytes)} "
            f"({format_bytes(others_bytes)} outside the layers and {_LEAST_LAYERS} layers of "
            f"{format_bytes(layer_bytes)}); set dense_memory={min(floor_bytes, dense_bytes)} or "
            "more"
        )
    num_layers = min((budget_bytes - others_bytes) // layer_bytes, len(modules) - 1)
    return WindowPlan(
        modules=modules,
        places=tuple(
            {name: _place(module, name) for name in of}
            for module, of in zip(modules, matrices, strict=True)
        ),
        tensor_map=tensor_map,
        dense_names=dense_names,
        num_layers=num_layers,
        dense_bytes=others_bytes + num_layers * layer_bytes,
    )


def _decoder_layers(model: PreTrainedModel, sites: Sequence[ExpertSite]) -> tuple[nn.Module, ...]:
    """The outermost list of modules that holds all experts."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and all(
            site.name.startswith(f"{name}.") for site in sites
        ):
            return tuple(module)
    raise UnsupportedModelError(
        f"{type(model).__name__} has no list of layers around its experts, so that its dense "
        "weights stay in memory; leave dense_memory out"
    )


def _matrices(found: Survey, modules: Sequence[nn.Module]) -> Iterator[dict[str, str]]:
    """Of each layer, by its name in there: the full name of each matrix that is its alone."""
    tied = getattr(found.model, "all_tied_weights_keys", None) or {}
    excluded = {*found.dtypes, *tied, *tied.values()}
    paths = {module: path for path, module in found.model.named_modules()}
    uses = Counter(id(p) for module in modules for p in module.parameters())
    for module in modules:
        full = {name: f"{paths[module]}.{name}" for name, _ in module.named_parameters()}
        yield {
            name: full[name]
            for name, value in module.named_parameters()
            if value.dim() >= 2 and full[name] not in excluded and uses[id(value)] == 1
        }


def _layer(
    model: PreTrainedModel,
    names: Mapping[str, str],
    dtypes: Mapping[str, torch.dtype],
    places: Mapping[str, Assembly],
) -> LayerExperts:
    """One decoder layer as a layer of one expert."""
    specs = [
        (name, tuple(model.get_parameter(full).shape), dtypes[full]) for name, full in names.items()
    ]
    return LayerExperts(
        1,
        ExpertLayout.pack(specs, phase_bytes=ALIGNMENT_BYTES),
        {name: stack([places[full]], 0) for name, full in names.items()},
        {name: [loaded_phase(places[full], dtypes[full])] for name, full in names.items()},
    )


def _place(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return module.get_submodule(path), attribute
