"""Builds engine and handle for sites whose bytes are known."""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from torch import nn

from moe_runtime.cache.lfu import LFUPolicy
from moe_runtime.cache.lru import LRUPolicy
from moe_runtime.cache.plec import PLECPolicy
from moe_runtime.cache.policy import EvictionPolicy
from moe_runtime.engine import ExpertEngine
from moe_runtime.integrations.transformers.budget import Budget
from moe_runtime.integrations.transformers.device_tiers import TierSettings, build_tiers
from moe_runtime.integrations.transformers.handle import Handle, Settings
from moe_runtime.integrations.transformers.sites import ExpertSite
from moe_runtime.layer import LayerMath
from moe_runtime.memory.assembly import Assembly, row_major, stack
from moe_runtime.memory.available import available_memory_bytes
from moe_runtime.memory.compact_slots import CompactSlots
from moe_runtime.memory.cuda_streams import CudaStreams
from moe_runtime.memory.disk import DiskReader
from moe_runtime.memory.expert_source import DiskSource
from moe_runtime.memory.layout import ALIGNMENT_BYTES, TORCH_DTYPES, ExpertLayout
from moe_runtime.memory.mapped_tensor import MappedTensor
from moe_runtime.memory.scaled_layer import is_scaled, scaled_layer
from moe_runtime.memory.slots import HostSlots, Slots
from moe_runtime.memory.tensor_map import LayerExperts, TensorMap
from moe_runtime.parallel.expert_parallel import ExpertParallel
from moe_runtime.tiered_engine import TieredEngine
from moe_runtime.tiered_math import TieredMath

POLICIES = (LRUPolicy.name, LFUPolicy.name, PLECPolicy.name)


def check_policy(policy: str | EvictionPolicy) -> None:
    """Raise ValueError, with the names there are, for one that no policy has."""
    if isinstance(policy, str) and policy not in POLICIES:
        raise ValueError(f"policy {policy!r} is unknown; choose from {', '.join(POLICIES)}")


def make_policy(policy: str | EvictionPolicy, tensor_map: TensorMap) -> EvictionPolicy:
    """The policy of that name for the experts of a model, or the one given."""
    check_policy(policy)
    if not isinstance(policy, str):
        return policy
    if policy == PLECPolicy.name:
        num_experts = max(layer.num_experts for layer in tensor_map.layers)
        return PLECPolicy(len(tensor_map.layers), num_experts)
    return LFUPolicy() if policy == LFUPolicy.name else LRUPolicy()


def build_tensor_map(
    sites: Sequence[ExpertSite],
    places: Mapping[str, Assembly],
    dtypes: Mapping[str, torch.dtype],
    phases: Mapping[str, int],
) -> TensorMap:
    """One entry a site, from where each of its tensors lies.

    `dtypes` and `phases` (addresses modulo a cache line in the unmodified model) are by full tensor
    name.
    """
    layers = []
    for site in sites:
        parameters, packed, expert_phases = {}, [], {}
        for parameter in site.parameters:
            names = site.tensor_names(parameter.name)
            parameters[parameter.name] = (
                places[names[0]] if site.is_fused else stack([places[n] for n in names], 0)
            )
            dtype = dtypes[names[0]]
            packed.append((parameter.name, parameter.shape, dtype))
            step = math.prod(parameter.shape) * dtype.itemsize
            expert_phases[parameter.name] = (
                [(phases[names[0]] + e * step) % ALIGNMENT_BYTES for e in range(site.num_experts)]
                if site.is_fused
                else [phases[name] for name in names]
            )
        has_phases = any(map(any, expert_phases.values()))
        expert_phases = expert_phases if has_phases else {}
        if any(map(is_scaled, parameters.values())):
            layers.append(scaled_layer(site.num_experts, packed, parameters, expert_phases))
            continue
        layout = ExpertLayout.pack(packed, phase_bytes=ALIGNMENT_BYTES if has_phases else 0)
        layers.append(LayerExperts(site.num_experts, layout, parameters, expert_phases))
    return TensorMap(layers)


def loaded_phase(assembly: Assembly, dtype: torch.dtype) -> int:
    """The address modulo a cache line at which `from_pretrained` holds a parameter on CPU.

    A tensor taken from the file as it is stays a view of the mapped file; one that was cast,
    stacked or otherwise moved is fresh memory, which starts on a cache line.
    """
    box = assembly.boxes[0]
    is_view = (
        len(assembly.boxes) == 1
        and box.stride == row_major(assembly.shape)
        and TORCH_DTYPES.get(box.source.dtype) == dtype
    )
    return (box.source.offset + box.offset * dtype.itemsize) % ALIGNMENT_BYTES if is_view else 0


def install(
    root: nn.Module,
    sites: Sequence[ExpertSite],
    maths: Sequence[LayerMath | TieredMath | None],
    tensor_map: TensorMap,
    budget: Budget,
    *,
    policy: str | EvictionPolicy,
    tiers: TierSettings,
    device: torch.device,
    direct: bool,
    dense_bytes: int,
    mapped: Mapping[str, MappedTensor] = MappingProxyType({}),
    spill_folder: Path | None = None,
    parallel: ExpertParallel | None = None,
) -> Handle:
    """Open the files, allocate the slots and put offloaded experts in the place of `sites`.

    `tiers` counts where `device` is an accelerator.
    """
    eviction = make_policy(policy, tensor_map)
    if device.type == "cpu" and not tiers.is_default:
        warnings.warn(
            "host_memory and miss have no effect on the CPU, where experts are computed from "
            "expert_memory; leave them out, or give a GPU as the device",
            stacklevel=3,
        )
    reader = DiskReader(tensor_map.files(), direct=direct)
    try:
        engine, budget = build_engine(tensor_map, budget, tiers, eviction, reader, device)
    except BaseException:
        reader.close()
        raise
    settings = Settings(
        policy=eviction.name,
        dtype=str(tensor_map.dtype).removeprefix("torch."),
        device=str(device),
        direct_reads=reader.is_direct,
        holds_all_experts=budget.holds_all,
        packed_on_disk=tensor_map.is_packed,
        quantisation=", ".join(tensor_map.formats()) or None,
    )
    return Handle(
        root,
        sites,
        maths,
        engine,
        budget,
        settings,
        dense_bytes=dense_bytes,
        mapped=mapped,
        device=device,
        spill_folder=spill_folder,
        parallel=parallel,
    )


def build_engine(
    tensor_map: TensorMap,
    budget: Budget,
    tiers: TierSettings,
    policy: EvictionPolicy,
    reader: DiskReader,
    device: torch.device,
) -> tuple[ExpertEngine | TieredEngine, Budget]:
    """The engine for `device`, and the budget with the slots that it got."""
    if device.type == "cpu":
        blobs = budget.kind.blobs
        slots: Slots = (
            HostSlots(budget.num_slots, budget.slot_bytes)
            if blobs is None
            else CompactSlots(budget.num_slots, budget.slot_bytes, budget.kind.room_bytes)
        )
        return ExpertEngine(tensor_map, slots, policy, reader, blobs=blobs), budget
    return build_tiers(
        tensor_map,
        budget,
        tiers,
        policy,
        CudaStreams(device),
        DiskSource(budget.kind.behind.blobs or tensor_map, reader),
        available_host_bytes=available_memory_bytes(),
    )


def dense_bytes_of(root: nn.Module, sites: Sequence[ExpertSite]) -> int:
    """Bytes of parameters and buffers that are not experts; shared ones count once.

    Weights that transformers is yet to tie, on a model that is still on meta, count as tied.
    """
    tied_names = getattr(root, "all_tied_weights_keys", None) or {}
    expert_names = {
        name for site in sites for p in site.parameters for name in site.tensor_names(p.name)
    }
    tensors = [
        tensor
        for named in (root.named_parameters(), root.named_buffers())
        for name, tensor in named
        if name not in expert_names and name not in tied_names
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
