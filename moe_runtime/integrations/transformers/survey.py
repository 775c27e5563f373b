"""What experts a checkpoint has and where their bytes lie, found before any weight is read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from moe_runtime.errors import UnsupportedModelError
from moe_runtime.integrations.transformers.conversion import assemble
from moe_runtime.integrations.transformers.install import (
    build_tensor_map,
    dense_bytes_of,
    loaded_phase,
)
from moe_runtime.integrations.transformers.resolve import ResolvedModel
from moe_runtime.integrations.transformers.sites import ExpertSite, find_sites
from moe_runtime.memory.checkpoint import Checkpoint
from moe_runtime.memory.layout import TORCH_DTYPES
from moe_runtime.memory.mapped_tensor import can_map
from moe_runtime.memory.scaled_tensor import ScaledTensor
from moe_runtime.memory.tensor_map import TensorMap


@dataclass(frozen=True, slots=True)
class Survey:
    """A model on the meta device, its experts still in it, and the map to their bytes."""

    model: PreTrainedModel
    sites: list[ExpertSite]
    tensor_map: TensorMap
    dtypes: Mapping[str, torch.dtype]  # of the experts' tensors, by full name
    dense_names: list[str]  # tensors of the checkpoint that are not experts
    scaled_dtypes: Mapping[str, torch.dtype]  # what becomes of those that are quantised
    dense_bytes: int
    lookup_names: list[str]  # those of which a token uses one row, as they are in the file
    lookup_bytes: int


def survey(model: PreTrainedModel, load_config: Any, checkpoint: Checkpoint) -> Survey:
    """Find the experts of `model`, as `from_pretrained` has built it on the meta device."""
    sites = find_sites(model)
    if not sites:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no experts that moe_runtime can offload: it is not a "
            "Mixture-of-Experts model of transformers 5, or a family without "
            "use_experts_implementation (docs/families.md lists what works)"
        )
    names = [n for s in sites for p in s.parameters for n in s.tensor_names(p.name)]
    places, dense_names = assemble(model, load_config.weight_mapping or [], checkpoint, names)
    dtypes = load_dtypes(model, names, load_config.dtype_plan or {})
    parameters = dict(model.named_parameters())
    scaled = [n for n in dense_names if isinstance(checkpoint[n], ScaledTensor) and n in parameters]
    scaled_dtypes = load_dtypes(model, scaled, load_config.dtype_plan or {})
    phases = {name: loaded_phase(places[name], dtypes[name]) for name in names}
    tensor_map = build_tensor_map(sites, places, dtypes, phases)
    lookups = _lookups(model, dense_names, checkpoint)
    return Survey(
        model,
        sites,
        tensor_map,
        dtypes,
        dense_names,
        scaled_dtypes,
        dense_bytes_of(model, sites),
        list(lookups),
        sum(lookups.values()),
    )


def survey_checkpoint(
    resolved: ResolvedModel,
    checkpoint: Checkpoint,
    *,
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
) -> Survey:
    """Run `from_pretrained` up to the moment when it would read weights, and stop there."""

    def stop(model: PreTrainedModel, load_config: Any) -> NoReturn:
        raise _WeightsAreNext(survey(model, load_config, checkpoint))

    model_class = causal_class(resolved.config, resolved.folder, trust_remote_code)
    try:
        loading_class(model_class, stop).from_pretrained(
            resolved.folder,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            **resolved.model_arguments({"dtype": dtype}),
        )
    except _WeightsAreNext as reached:
        return reached.survey
    raise AssertionError("from_pretrained() returned without asking for weights")


class _WeightsAreNext(Exception):  # noqa: N818 -- not an error
    """Leaves `from_pretrained` with what is known of the model."""

    def __init__(self, survey: Survey) -> None:
        super().__init__()
        self.survey = survey


def loading_class(
    model_class: type[PreTrainedModel],
    take_experts: Callable[[PreTrainedModel, Any], dict[str, Any]],
) -> type[PreTrainedModel]:
    """`model_class` with one seam opened: the moment when the meta model is complete.

    `take_experts` gets the model and transformers' loading settings, and returns the tensors left
    to load. Everything else (config, dtype, tied weights, fp32 buffers, generation config) is
    `from_pretrained` as it stands.
    """

    def load_pretrained(
        model: PreTrainedModel,
        state_dict: object,
        checkpoint_files: Any,
        load_config: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        dense = take_experts(model, load_config)
        return model_class._load_pretrained_model(
            model, dense, checkpoint_files, load_config, *args, **kwargs
        )

    members = {
        "_load_pretrained_model": staticmethod(load_pretrained),
        "__module__": model_class.__module__,
    }
    return type(model_class.__name__, (model_class,), members)


def causal_class(
    config: PreTrainedConfig, folder: Path, trust_remote_code: bool
) -> type[PreTrainedModel]:
    """The class that AutoModelForCausalLM would build. Raises UnsupportedModelError."""
    auto_map = getattr(config, "auto_map", None) or {}
    if trust_remote_code and "AutoModelForCausalLM" in auto_map:
        remote: type[PreTrainedModel] = get_class_from_dynamic_module(
            auto_map["AutoModelForCausalLM"], str(folder)
        )
        return remote
    mapping = AutoModelForCausalLM._model_mapping
    if type(config) not in mapping:
        # Some families have a causal model that AutoModelForCausalLM does not list.
        for name in config.architectures or ():
            unlisted = getattr(transformers, name, None)
            if isinstance(unlisted, type) and name.endswith("ForCausalLM"):
                return unlisted
        raise UnsupportedModelError(
            f"model type {config.model_type!r} has no causal language model in transformers; "
            "moe_runtime loads the models of AutoModelForCausalLM"
        )
    found: Any = mapping[type(config)]
    classes: tuple[type[PreTrainedModel], ...] = found if isinstance(found, tuple) else (found,)
    named = {c.__name__: c for c in classes}
    return next((named[name] for name in config.architectures or () if name in named), classes[0])


def _lookups(
    model: PreTrainedModel, dense_names: list[str], checkpoint: Checkpoint
) -> dict[str, int]:
    """Bytes of embeddings, by name, that nobody multiplies with and nobody casts."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    eligible = set(dense_names) - {*tied, *tied.values()}
    found = {}
    for path, module in model.named_modules():
        name = f"{path}.weight"
        if isinstance(module, nn.Embedding) and name in eligible:
            place, weight = checkpoint[name], module.weight
            same_dtype = TORCH_DTYPES.get(place.dtype) == weight.dtype
            same_shape = tuple(place.shape) == tuple(weight.shape)
            if same_dtype and same_shape and can_map(place):
                found[name] = place.num_bytes
    return found


def load_dtypes(
    model: nn.Module, names: list[str], dtype_plan: Mapping[str, torch.dtype]
) -> dict[str, torch.dtype]:
    """The dtype that `from_pretrained` would give each parameter."""
    parameters = dict(model.named_parameters())
    dtypes = {name: parameters[name].dtype for name in names}
    if dtype_plan:
        pattern, by_group, _ = build_glob_alternation(list(dtype_plan))
        for name in names:
            match = pattern.search(name)
            if match is not None and match.lastgroup is not None:
                dtypes[name] = dtype_plan[by_group[match.lastgroup]]
    return dtypes
