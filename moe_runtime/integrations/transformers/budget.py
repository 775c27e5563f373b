"""Turns what the user allows into a number of expert slots."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch

from moe_runtime.errors import BudgetError, UnsupportedModelError
from moe_runtime.expert_memory import ExpertMemory, format_bytes
from moe_runtime.integrations.transformers.sites import ExpertSite
from moe_runtime.kernels.quantise import QUANTISED_DTYPES, QuantisedDtype
from moe_runtime.memory.available import available_memory_bytes
from moe_runtime.memory.packed_map import PackedMap
from moe_runtime.memory.quantised_map import QuantisedMap
from moe_runtime.memory.scaled_map import ScaledMap
from moe_runtime.memory.tensor_map import TensorMap

# Kept free under 'auto' for activations, the KV cache and the allocator's slack.
_RESERVE_BYTES = 512 * 2**20
_RESERVE_SHARE = 0.1


SLOT_KINDS = ("auto", "packed", "unpacked")
EXPERT_DTYPES = ("auto", *QUANTISED_DTYPES)


@dataclass(frozen=True, slots=True)
class SlotKind:
    """What a slot holds: an expert as it is elsewhere, or as `blobs` has it.

    `room_bytes` stand beside the slots: room for one expanded expert, where nothing computes from
    `blobs`, or for packed ones on their way into slots of a device. `host` is what host slots
    behind a device hold, where that is something else.
    """

    name: str  # "unpacked", "packed", a quantised dtype, or the formats of the files
    slot_bytes: int
    blobs: PackedMap | QuantisedMap | ScaledMap | None = None
    room_bytes: int = 0
    host: "SlotKind | None" = None

    @property
    def behind(self) -> "SlotKind":
        """What host slots behind these hold."""
        return self if self.host is None else self.host

    def num_slots(self, budget_bytes: int) -> int:
        """Slots within so many bytes."""
        return max(budget_bytes - self.room_bytes, 0) // self.slot_bytes

    def bytes_of(self, num_slots: int) -> int:
        """Memory of so many slots, and of what stands beside them."""
        return num_slots * self.slot_bytes + self.room_bytes


@dataclass(frozen=True, slots=True)
class Budget:
    """Slots for experts, and the figures they follow from.

    `floor_slots` are the fewest that run one token, and `floor_bytes` what they take. `num_experts`
    are those of this process, and `expert_total_bytes` theirs as they compute, packed or not; of
    quantised ones as they are stored. What stands beside the slots is counted.
    """

    num_slots: int
    kind: SlotKind
    budget_bytes: int
    floor_slots: int
    floor_bytes: int
    expert_total_bytes: int
    num_experts: int

    @property
    def slot_bytes(self) -> int:
        return self.kind.slot_bytes

    @property
    def used_bytes(self) -> int:
        """Memory of the slots, and of what stands beside them."""
        return self.kind.bytes_of(self.num_slots)

    @property
    def holds_all(self) -> bool:
        """Whether every expert of this process has a slot."""
        return self.num_slots >= self.num_experts


def device_available_bytes(device: torch.device) -> int:
    """Memory that is free where `device` computes."""
    if device.type == "cpu":
        return available_memory_bytes()
    return int(torch.cuda.mem_get_info(device)[0])


def floor_slots(sites: Sequence[ExpertSite]) -> int:
    """The fewest slots that can run one token: the experts that it uses in one layer."""
    return max(site.top_k for site in sites)


def slot_kinds(
    tensor_map: TensorMap,
    wanted: str = "auto",
    *,
    expert_dtype: str = "auto",
    computes_compact: bool,
) -> list[SlotKind]:
    """What slots in host memory may hold, the best first. Raises UnsupportedModelError.

    `wanted` is one of SLOT_KINDS and `expert_dtype` of EXPERT_DTYPES. `computes_compact`: whether
    kernels compute from packed and quantised rows, in all layers. Packed experts then stay packed:
    more of them fit, and fewer bytes are faster. Elsewhere they are unpacked into slots unless only
    packed ones fit: unpacking at each use costs as much time as the additional hits save.
    """
    check_wanted(wanted, expert_dtype)
    scaled = ScaledMap.of(tensor_map)
    if scaled is not None and wanted != "packed" and expert_dtype == "auto":
        name = "+".join(tensor_map.formats())
        room_bytes = 0 if computes_compact else scaled.computed_bytes
        return [SlotKind(name, scaled.slot_bytes, scaled, room_bytes)]
    room_bytes = 0 if computes_compact else tensor_map.slot_bytes
    if expert_dtype != "auto":
        if wanted != "auto":
            raise ValueError(
                f"expert_dtype={expert_dtype!r} says what slots hold, and so does "
                f"expert_slots={wanted!r}; leave out one of them"
            )
        quantised = QuantisedMap(tensor_map, cast(QuantisedDtype, expert_dtype))
        return [SlotKind(expert_dtype, quantised.slot_bytes, quantised, room_bytes)]
    plain = SlotKind("unpacked", tensor_map.slot_bytes)
    packed = PackedMap.of(tensor_map) if wanted != "unpacked" else None
    if packed is None:
        if wanted == "packed":
            raise UnsupportedModelError(
                "expert_slots='packed' needs experts that are packed and computed as they are "
                "stored; pack the model (moe-runtime pack) and load it in bfloat16, or leave "
                "expert_slots out"
            )
        return [plain]
    kept = SlotKind("packed", packed.slot_bytes, packed, room_bytes)
    if wanted == "packed":
        return [kept]
    return [kept, plain] if computes_compact else [plain, kept]


def check_wanted(wanted: str, expert_dtype: str) -> None:
    """Raise ValueError, with what there is, for settings of load() that mean nothing."""
    for name, value, choices in (
        ("expert_slots", wanted, SLOT_KINDS),
        ("expert_dtype", expert_dtype, EXPERT_DTYPES),
    ):
        if value not in choices:
            raise ValueError(f"{name} {value!r} is unknown; choose from {', '.join(choices)}")


def smallest_bytes(kinds: Sequence[SlotKind], sites: Sequence[ExpertSite]) -> int:
    """The least expert memory with which any of `kinds` runs one token."""
    return min(kind.bytes_of(floor_slots(sites)) for kind in kinds)


def plan_budget(
    expert_memory: ExpertMemory,
    tensor_map: TensorMap,
    sites: Sequence[ExpertSite],
    kinds: Sequence[SlotKind],
    *,
    dense_bytes: int,
    available_bytes: int,
    max_memory: Mapping[int | str, int | str] | None = None,
    device: int | str = "cpu",
    num_held: int | None = None,
) -> Budget:
    """Slots within `expert_memory`, and within `max_memory[device]` once dense weights are paid.

    `available_bytes` is what is free before the dense weights load. Raises BudgetError, saying the
    floor, when too little is left for the experts of one token, and when the budget exceeds what
    is free. Slots are of the first of `kinds` that makes enough of them. `num_held` are the experts
    that this process computes, if not all.
    """
    num_experts = tensor_map.num_experts if num_held is None else num_held
    # '100%' means all of them, and what stands beside.
    total_bytes = max(num_experts * tensor_map.slot_bytes, kinds[0].bytes_of(num_experts))
    free = available_bytes - dense_bytes - _reserve_bytes(available_bytes)
    budget_bytes = expert_memory.resolve(expert_total_bytes=total_bytes, available_bytes=free)
    floor = min(floor_slots(sites), num_experts)
    floor_bytes = min(kind.bytes_of(floor) for kind in kinds)
    remedy = f"expert_memory={floor_bytes}"
    _refuse_unknown_devices(max_memory or {})
    if max_memory is not None and device in max_memory:
        limit = max_memory[device]
        limit_bytes = limit if isinstance(limit, int) else ExpertMemory.parse(limit).num_bytes
        if limit_bytes is None:
            raise BudgetError(f"max_memory[{device!r}] is {limit!r}; write a size such as '10GiB'")
        if limit_bytes - dense_bytes < budget_bytes:
            budget_bytes = limit_bytes - dense_bytes
            remedy = f"max_memory[{device!r}]={dense_bytes + floor_bytes}, dense weights included,"
    if budget_bytes < floor_bytes:
        raise BudgetError(
            f"{format_bytes(max(budget_bytes, 0))} for experts is below the floor of "
            f"{format_bytes(floor_bytes)} ({floor} experts of "
            f"{format_bytes(kinds[0].slot_bytes)}, what one token uses in one layer); "
            f"set {remedy} or more"
        )
    if budget_bytes > available_bytes - dense_bytes:
        raise BudgetError(
            f"{format_bytes(budget_bytes)} for experts and {format_bytes(dense_bytes)} of dense "
            f"weights do not fit in the {format_bytes(available_bytes)} that are free; set "
            f"expert_memory={max(free, floor_bytes)} or less, or 'auto'"
        )
    kind = next(k for k in kinds if k.num_slots(budget_bytes) >= floor)
    num_slots = min(kind.num_slots(budget_bytes), num_experts)
    hitting = sum(site.top_k for site in sites)
    if num_slots < min(hitting, num_experts):
        warnings.warn(
            f"{num_slots} expert slots are fewer than the {hitting} that one token uses over all "
            f"layers: nearly every use reads the disk; {format_bytes(kind.bytes_of(hitting))} "
            "would let the cache hit",
            stacklevel=3,
        )
    return Budget(num_slots, kind, budget_bytes, floor, floor_bytes, total_bytes, num_experts)


def dense_room_bytes(
    expert_memory: ExpertMemory,
    tensor_map: TensorMap,
    sites: Sequence[ExpertSite],
    available_bytes: int,
) -> int:
    """What memory has for dense weights beside the experts asked for, or those of one token."""
    wanted_bytes = expert_memory.resolve(
        expert_total_bytes=tensor_map.num_experts * tensor_map.slot_bytes, available_bytes=0
    )
    experts_bytes = max(wanted_bytes, floor_slots(sites) * tensor_map.slot_bytes)
    return available_bytes - _reserve_bytes(available_bytes) - experts_bytes


def _reserve_bytes(available_bytes: int) -> int:
    return max(_RESERVE_BYTES, int(_RESERVE_SHARE * available_bytes))


def _refuse_unknown_devices(max_memory: Mapping[int | str, int | str]) -> None:
    """A limit on a device that nobody has would be no limit at all."""
    for name in max_memory:
        if not isinstance(name, int) and name not in ("cpu", "disk", "mps"):
            raise BudgetError(
                f"max_memory names {name!r}; its keys are GPU numbers such as 0, and 'cpu'"
            )
