"""`from_pretrained` for models whose experts stay on disk."""

import inspect
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from moe_runtime.cache.policy import EvictionPolicy
from moe_runtime.errors import CheckpointError, UnsupportedModelError
from moe_runtime.expert_memory import ExpertMemory
from moe_runtime.integrations.transformers.budget import (
    Budget,
    dense_room_bytes,
    device_available_bytes,
    plan_budget,
    slot_kinds,
)
from moe_runtime.integrations.transformers.choice import choose_maths, computes_compact
from moe_runtime.integrations.transformers.device import has_tiers, single_device
from moe_runtime.integrations.transformers.device_kernels import find_unpack
from moe_runtime.integrations.transformers.device_kinds import device_slot_kinds
from moe_runtime.integrations.transformers.device_tiers import TierSettings
from moe_runtime.integrations.transformers.foresee import (
    Origin,
    check_predictor,
    foresee,
    start_warm,
)
from moe_runtime.integrations.transformers.install import check_policy, install
from moe_runtime.integrations.transformers.layer_window import LayerWindow, WindowPlan
from moe_runtime.integrations.transformers.linears import speed_up_linears
from moe_runtime.integrations.transformers.ranks import Ranks, check_maths
from moe_runtime.integrations.transformers.resolve import ARGUMENTS, resolve_model
from moe_runtime.integrations.transformers.sites import ExpertSite
from moe_runtime.integrations.transformers.stepping import step_layers
from moe_runtime.integrations.transformers.survey import causal_class, loading_class, survey
from moe_runtime.integrations.transformers.tiered_maths import as_stored
from moe_runtime.integrations.transformers.window_plan import parse_dense_memory, plan_window
from moe_runtime.layer import LayerMath
from moe_runtime.memory.checkpoint import Checkpoint
from moe_runtime.memory.mapped_tensor import MappedTensor
from moe_runtime.memory.read_tensor import read_scaled, read_tensor
from moe_runtime.memory.scaled_tensor import ScaledTensor
from moe_runtime.memory.tensor_map import TensorMap
from moe_runtime.parallel.expert_parallel import ExpertParallel
from moe_runtime.parallel.world import own_device
from moe_runtime.placement.cocluster import DeviceTables
from moe_runtime.placement_map import Placement
from moe_runtime.tiered_math import TieredMath
from moe_runtime.warm_start import state_folder

logger = logging.getLogger("moe_runtime")


def load(
    model: str | Path,
    *,
    expert_memory: str | int | float = "auto",
    dense_memory: str | int | float = "auto",
    host_memory: str | int | float = "auto",
    miss: str = "auto",
    policy: str | EvictionPolicy = "lru",
    expert_slots: str = "auto",
    expert_dtype: str = "auto",
    page_cache: bool = False,
    exact: bool = False,
    linears: bool = False,
    predictor: str | Path = "off",
    warm_start: bool | str | Path = True,
    max_memory: Mapping[int | str, int | str] | None = None,
    device_map: str | int | torch.device | Mapping[str, Any] | None = None,
    mesh: Any = None,
    placement: str | Path | Placement | None = None,
    dispatch: str | None = None,
    payload: str = "exact",
    pipeline: int | str | Path = 1,
    attention: str | None = None,
    tables: str | Path | DeviceTables | None = None,
    timeout_seconds: float | None = None,
    revision: str | None = None,
    subfolder: str = "",
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
    **from_pretrained_kwargs: Any,
) -> PreTrainedModel:
    """A transformers causal language model whose experts are read from disk when needed.

    `model` is a folder or a hub id. `expert_memory` bounds the memory that experts take: 'auto'
    (all if they fit what is free, else what fits), '512MiB', '33%', 0.33 (a share of all expert
    bytes) or bytes. `policy` is 'lru', 'lfu', 'plec', or a policy of moe_runtime.cache. Reads
    bypass the page cache unless `page_cache`. Experts that `moe-runtime pack` has packed may stay
    so in memory, where a third more of them fit, and be computed from as they are: `expert_slots`
    is 'packed', 'unpacked', or 'auto', which is 'packed' where a kernel does that; on a GPU it says
    how they lie in host memory, from where they travel packed and are unpacked on arrival.
    `expert_dtype` 'int8' or 'int4' rounds bfloat16 experts when they are read, so that twice or 3.5
    times as many fit in memory: a lossy choice, which is never made for you, and refused with
    `exact`.
    Experts that a checkpoint holds in fp8 or mxfp4 stay so in memory, on a GPU too. A kernel
    computes from them as they are, on the CPU in bfloat16; with `exact`, in other dtypes and for
    many tokens one at a time is dequantised when it is used. Other fp8 weights take the model's
    dtype while loading.
    `exact` computes as the unmodified model does with `experts_implementation="eager"`, bit for bit
    on CPU, on several ranks too (with alltoall, or speculative and attention data). Otherwise a
    kernel computes experts where there is one, with fewer roundings; `linears`
    gives it the model's linear layers too, while there are few tokens.
    `dense_memory`, written like `expert_memory`, bounds the memory of all other weights on the CPU:
    'auto' is all if they fit beside the experts, else what fits. Layers that do not fit are read
    from disk in every forward, each while the one before it computes.
    `predictor` says what a token will need, so that the disk reads it while layers compute, and on
    a GPU the link brings it: 'auto' (the model's own routers, a layer or two ahead, where they are
    found), 'gate_lookahead' (the same, or an error), a file of `moe-runtime predictor train`, or
    'off'. It reads only while that gains time, and changes no output. `warm_start` keeps what was
    hot at close() for the next start: True in the user's cache folder, or a folder of your own;
    False to start empty.
    `device_map` is one device: the first GPU if there is one, else the CPU. On a GPU
    `expert_memory` is its memory, and `host_memory`, written alike, pinned host memory behind it:
    'auto' is all experts if they fit, else what fits. `miss` says what happens to an expert that
    the GPU lacks: it is copied there ('copy'), computed on the CPU ('cpu'), or what measures faster
    ('auto'). Outputs do not depend on what was cached, except that the CPU rounds differently where
    it computed an expert; with `exact` it computes none.
    `max_memory={0: "10GiB", "cpu": "30GiB"}` limits dense weights and experts together on the
    device in use. On CPU, embeddings that are not tied are mapped, not read: a token touches one
    row, and their memory goes to experts. Other arguments are those of `from_pretrained`.

    On several ranks, `mesh` (a torch DeviceMesh of one dimension; without it, all that torchrun has
    started), `placement` (a file; without it experts e * G / E on rank e) or `dispatch` ('auto',
    'alltoall', 'allreduce', 'hierarchical', 'coherent', 'speculative') shares the experts among
    them: each rank reads its own, and `expert_memory` is for these. Ranks generate from prompts of
    their own, in step; `handle(model).parallel.finish()` follows each rank's last, and
    `handle(model).parallel.ask_to_migrate(placement)` moves experts meanwhile. `payload` 'bfloat16'
    or 'int8' rounds hidden states in messages: a lossy choice, never made for you. `pipeline`
    chunks of a layer's tokens let messages and computing overlap: a number, or a file of
    `moe-runtime probe --collectives`, by which each forward has the best. With `attention` 'tensor'
    ranks have a share of the heads each, and run the same prompts. `tables`, for 'speculative', is
    what `placement solve --tables` wrote with the placement. `timeout_seconds` is how long a rank
    waits for another, where the process group is made here.

    Raises BudgetError (too little memory, with the floor), CheckpointError (missing or damaged
    files), UnsupportedModelError (no experts, otherwise quantised, unknown family), PredictorError
    (damaged, or of another model), TypeError (unknown argument), PlacementError (of another model
    or number of ranks) and ParallelError (ranks that cannot meet or disagree).
    """
    check_policy(policy)
    check_predictor(predictor)
    if exact and linears:
        raise ValueError(
            "linears=True rounds otherwise than the unmodified model and exact=True asks for its "
            "bits; leave out one of them"
        )
    if exact and expert_dtype != "auto":
        raise ValueError(
            f"expert_dtype={expert_dtype!r} changes the weights and exact=True asks for the "
            "unmodified model's bits; leave out one of them"
        )
    memory = ExpertMemory.parse(expert_memory)
    may_shrink = memory == ExpertMemory()
    dense = parse_dense_memory(dense_memory)
    tiers = TierSettings.parse(host_memory, miss, may_shrink=may_shrink, exact=exact)
    device = single_device(device_map)
    if any(option is not None for option in (mesh, placement, dispatch, attention, tables)):
        device = own_device(device)
    resolved = resolve_model(
        model,
        revision=revision,
        subfolder=subfolder,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        trust_remote_code=trust_remote_code,
    )
    _refuse_unknown(from_pretrained_kwargs, resolved.config)
    checkpoint = resolved.open_checkpoint()
    ranks = Ranks.join(
        mesh=mesh,
        placement=placement,
        dispatch=dispatch,
        payload=payload,
        pipeline=pipeline,
        attention=attention,
        tables=tables,
        timeout_seconds=timeout_seconds,
        device=device,
        exact=exact,
        predictor=predictor,
    )
    may_stream = device.type == "cpu" and ranks is None and predictor == "off"
    if dense != ExpertMemory() and not may_stream:
        raise ValueError(
            f"dense_memory={dense_memory!r} is for one process on the CPU without a predictor; "
            "leave it out, or the others"
        )
    plan = _Plan(
        checkpoint,
        memory,
        dense if may_stream else None,
        max_memory,
        device,
        expert_slots,
        expert_dtype,
        ranks,
        exact=exact,
    )
    model_class = causal_class(resolved.config, resolved.folder, trust_remote_code)
    wants_info = from_pretrained_kwargs.pop("output_loading_info", False)
    try:
        loaded: Any = loading_class(model_class, plan.take_experts).from_pretrained(
            resolved.folder,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **resolved.model_arguments(from_pretrained_kwargs),
        )
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise CheckpointError(
            f"weights in {resolved.folder} have other shapes than its config.json says"
            f"{plan.misshapen()}; download config and weights again"
        ) from error
    result: PreTrainedModel = loaded[0]
    info: dict[str, Any] = loaded[1]
    if info["missing_keys"]:  # transformers would fill them with random numbers
        first, *more = sorted(info["missing_keys"])
        raise CheckpointError(
            f"{resolved.folder} lacks {first}{f' and {len(more)} more' if more else ''}; "
            "download the checkpoint completely"
        )
    result.__class__ = model_class
    if device.type != "cpu":
        result.to(device)  # type: ignore[arg-type]  # PreTrainedModel.to is mistyped
    made = plan.made
    if made is None:
        raise UnsupportedModelError(f"{model} loaded without replacing any experts module")
    handle = install(
        result,
        made.sites,
        made.maths,
        made.tensor_map,
        made.budget,
        policy=policy,
        tiers=tiers,
        device=device,
        direct=not page_cache,
        dense_bytes=made.dense_bytes,
        mapped=plan.mapped,
        parallel=made.parallel,
    )
    try:
        if plan.window is not None:
            handle.stream(LayerWindow(plan.window, direct=not page_cache))
        if linears:
            speed_up_linears(result)
        # What another run had in its cache may be another rank's.
        state = state_folder(warm_start) if ranks is None else None
        origin = Origin.of(resolved.folder, handle, state)
        foresee(result, handle, predictor, origin)
        if ranks is not None:
            step_layers(result, handle, ranks)
        if state is not None:
            start_warm(handle, state, origin)
    except BaseException:
        handle.close()
        raise
    if expert_dtype != "auto":
        warnings.warn(
            f"experts are rounded to {expert_dtype} when they are read: outputs differ from the "
            "unmodified model's",
            stacklevel=2,
        )
    if payload != "exact" and ranks is not None and ranks.world.num_ranks > 1:
        warnings.warn(
            f"hidden states are rounded to {payload} when they travel between ranks: outputs "
            "differ from the unmodified model's",
            stacklevel=2,
        )
    logger.info("%s: %s", model, handle.placement())
    return (result, info) if wants_info else result  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class _Made:
    """What was found out while transformers had the model on the meta device."""

    sites: list[ExpertSite]
    maths: list[LayerMath | TieredMath | None]
    tensor_map: TensorMap
    budget: Budget
    dense_bytes: int
    parallel: ExpertParallel | None


class _Plan:
    """Takes the experts out of a meta model and finds their bytes, before dense weights load."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        memory: ExpertMemory,
        dense_memory: ExpertMemory | None,  # None: all dense weights are in memory
        max_memory: Mapping[int | str, int | str] | None,
        device: torch.device,
        expert_slots: str,
        expert_dtype: str,
        ranks: Ranks | None,
        *,
        exact: bool,
    ) -> None:
        self._expert_slots = expert_slots
        self._expert_dtype = expert_dtype
        self._ranks = ranks
        self._exact = exact
        self.made: _Made | None = None
        self.window: WindowPlan | None = None
        self.mapped: dict[str, MappedTensor] = {}  # by name, as they are read
        self._shapes: dict[str, list[int]] = {}
        self._scaled_dtypes: Mapping[str, torch.dtype] = {}
        self._checkpoint = checkpoint
        self._memory = memory
        self._dense_memory = dense_memory
        self._max_memory = max_memory
        self._device = device

    def take_experts(self, model: PreTrainedModel, load_config: Any) -> "dict[str, _LazyTensor]":
        """Remove experts from `model`; returns the dense tensors left to load."""
        found = survey(model, load_config, self._checkpoint)
        accelerated = has_tiers(self._device)
        layers = found.tensor_map.layers
        maths = choose_maths(
            found.sites, found.dtypes, self._device, exact=self._exact, layers=layers
        )
        if self._expert_dtype != "auto":
            _refuse_columns(found.sites, self._expert_dtype)
        parallel, num_neighbours = None, 1
        if self._ranks is not None:
            check_maths(found.sites, maths)
            settings = {"slots": self._expert_slots, "expert dtype": self._expert_dtype}
            parallel = self._ranks.share(found, self._checkpoint.folder, settings)
            num_neighbours = self._ranks.world.num_neighbours
        tensor_map, wanted = found.tensor_map, self._expert_slots
        if accelerated:
            tensor_map = tensor_map.on_cache_lines()
            maths = as_stored(maths, tensor_map, self._device)
            kinds = device_slot_kinds(
                tensor_map,
                maths,
                wanted,
                expert_dtype=self._expert_dtype,
                can_unpack=find_unpack(self._device) is not None,
            )
        else:
            compact = computes_compact(maths, layers)
            # The kernel's bits know no addresses.
            tensor_map = tensor_map.beside_blocks(only_scaled=not compact)
            kinds = slot_kinds(
                tensor_map, wanted, expert_dtype=self._expert_dtype, computes_compact=compact
            )
        available_bytes = device_available_bytes(self._device) // num_neighbours
        dense_bytes = found.dense_bytes - (0 if accelerated else found.lookup_bytes)
        dense_names = found.dense_names
        if self._dense_memory is not None:
            self.window = plan_window(
                self._dense_memory,
                found,
                load_config,
                self._checkpoint,
                dense_bytes=dense_bytes,
                free_bytes=dense_room_bytes(self._memory, tensor_map, found.sites, available_bytes),
                exact=self._exact,
            )
        if self.window is not None:
            dense_bytes, dense_names = self.window.dense_bytes, self.window.dense_names
        budget = plan_budget(
            self._memory,
            tensor_map,
            found.sites,
            kinds,
            dense_bytes=dense_bytes,
            available_bytes=available_bytes,
            max_memory=self._max_memory,
            device="cpu" if self._device.type == "cpu" else self._device.index or 0,
            num_held=None if parallel is None else parallel.plan.num_held,
        )
        for site in found.sites:
            _empty(site)
        if self.window is not None:
            self.window.take_weights()
        self._scaled_dtypes = found.scaled_dtypes
        self._shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
        self.made = _Made(found.sites, maths, tensor_map, budget, found.dense_bytes, parallel)
        lookups = () if accelerated else found.lookup_names
        return {
            name: _LazyTensor(partial(self._map if name in lookups else self._read, name))
            for name in dense_names
        }

    def _read(self, name: str) -> torch.Tensor:
        place = self._checkpoint[name]
        if not isinstance(place, ScaledTensor):
            return read_tensor(place)
        return read_scaled(place, self._scaled_dtypes.get(name, torch.float32))

    def _map(self, name: str) -> torch.Tensor:
        self.mapped[name] = MappedTensor(self._checkpoint[name])
        return self.mapped[name].tensor

    def misshapen(self) -> str:
        """The first tensor that does not fit the model, if that shows before conversion."""
        for name, shape in self._shapes.items():
            if name in self._checkpoint and list(self._checkpoint[name].shape) != shape:
                return f": {self._checkpoint[name]} should be {shape}"
        return ""


class _LazyTensor:
    """What transformers' loader asks for: `tensor[...]` reads it."""

    def __init__(self, read: Callable[[], torch.Tensor]) -> None:
        self._read = read

    def __getitem__(self, index: object) -> torch.Tensor:
        return self._read()


def _empty(site: ExpertSite) -> None:
    """Drop the meta parameters; the loader must neither look for them nor initialise them."""
    if site.is_fused:
        for parameter in site.parameters:
            del site.module._parameters[parameter.name]
        site.module.__dict__["_is_hf_initialized"] = True
        return
    for module in site.module.children():
        for parameter in site.parameters:
            path, _, attribute = parameter.name.rpartition(".")
            owner = module.get_submodule(path)
            owner._parameters[attribute] = None
            owner.__dict__["_is_hf_initialized"] = True


def _refuse_columns(sites: Sequence[ExpertSite], expert_dtype: str) -> None:
    """Rows of transposed weights are inputs, and scales belong to outputs."""
    for site in sites:
        if getattr(site.module, "is_transposed", False):
            raise UnsupportedModelError(
                f"expert_dtype={expert_dtype!r} rounds rows of outputs, and {site.name} holds its "
                "weights transposed; leave expert_dtype out"
            )


def _refuse_unknown(kwargs: Mapping[str, Any], config: PreTrainedConfig) -> None:
    if "experts_implementation" in kwargs:
        raise TypeError(
            "experts_implementation has no effect on offloaded experts; leave it out "
            "(exact=True gives the outputs of 'eager')"
        )
    if "quantization_config" in kwargs:
        raise TypeError(
            "quantization_config has no effect: quantised experts stay as the checkpoint has them; "
            "leave it out"
        )
    ours = set(inspect.signature(load).parameters) - {"from_pretrained_kwargs"}
    for name in kwargs:
        if name not in ARGUMENTS and not hasattr(config, name):
            raise TypeError(
                f"load() got an unknown argument {name!r}; it takes "
                f"{', '.join(sorted(ours | ARGUMENTS))} and attributes of {type(config).__name__}"
            )
