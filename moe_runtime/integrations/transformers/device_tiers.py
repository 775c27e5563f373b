"""Sizes and builds the tiers of experts for a model that computes on an accelerator."""

import warnings
from dataclasses import dataclass, replace

from moe_runtime.cache.policy import EvictionPolicy
from moe_runtime.errors import BudgetError, DeviceMemoryError
from moe_runtime.expert_memory import ExpertMemory, format_bytes
from moe_runtime.integrations.transformers.budget import Budget
from moe_runtime.integrations.transformers.device_kernels import find_dequantizer, find_unpack
from moe_runtime.memory.device_room import DeviceRoom
from moe_runtime.memory.device_slots import DeviceSlots
from moe_runtime.memory.expert_source import ExpertSource
from moe_runtime.memory.packed_landing import PackedLanding
from moe_runtime.memory.packed_map import PackedMap
from moe_runtime.memory.pinned_slots import PinnedSlots
from moe_runtime.memory.scaled_map import ScaledMap
from moe_runtime.memory.stream import Streams
from moe_runtime.memory.tensor_map import TensorMap
from moe_runtime.scheduling.miss_plan import MissWay
from moe_runtime.scheduling.miss_planner import MissPlanner
from moe_runtime.tiered_engine import TieredEngine

# Kept free of pinned memory, which the system can neither move nor give to anybody else.
_HOST_RESERVE_BYTES = 2**30
_HOST_RESERVE_SHARE = 0.2
# Where the device holds every expert, host memory only passes them on while they load.
_PASSING_SLOTS = 16
# Left to activations when slots shrink to what the device has free.
_DEVICE_RESERVE_BYTES = 512 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class TierSettings:
    """What the user says of tiers below a device; `may_shrink` its slots if its memory is short."""

    host_memory: ExpertMemory
    miss: MissWay
    may_shrink: bool

    @property
    def is_default(self) -> bool:
        """Whether the user said nothing of `host_memory` and `miss`."""
        return self.host_memory == ExpertMemory() and self.miss is MissWay.AUTO

    @classmethod
    def parse(
        cls, host_memory: str | int | float, miss: str, *, may_shrink: bool, exact: bool
    ) -> "TierSettings":
        """Raises BudgetError, and ValueError with the ways there are."""
        if miss not in list(MissWay):
            raise ValueError(f"miss {miss!r} is unknown; choose from {', '.join(MissWay)}")
        if exact and miss == MissWay.CPU:
            raise ValueError(
                "miss='cpu' lets the CPU compute experts, which rounds otherwise than the GPU, and "
                "exact=True asks for the unmodified model's bits; leave out one of them"
            )
        try:
            memory = ExpertMemory.parse(host_memory)
        except BudgetError as error:
            raise BudgetError(str(error).replace("expert_memory", "host_memory")) from None
        return cls(host_memory=memory, miss=MissWay(miss), may_shrink=may_shrink)


def build_tiers(
    tensor_map: TensorMap,
    budget: Budget,
    tiers: TierSettings,
    policy: EvictionPolicy,
    streams: Streams,
    source: ExpertSource,
    *,
    available_host_bytes: int,
) -> tuple[TieredEngine, Budget]:
    """An engine whose slots are allocated, and the budget with the slots that there are.

    Raises BudgetError when the device or the host lacks the memory.
    """
    num_host_slots = plan_host_slots(tiers.host_memory, tensor_map, budget, available_host_bytes)
    device_slots = _device_slots(tensor_map, budget, streams, may_shrink=tiers.may_shrink)
    host = budget.kind.behind
    host_bytes = format_bytes(num_host_slots * host.slot_bytes)
    try:
        host_slots = PinnedSlots(
            num_host_slots, host.slot_bytes, streams, room_bytes=host.room_bytes
        )
    except (OSError, MemoryError) as error:
        raise BudgetError(
            f"{host_bytes} of host memory for experts could not be mapped ({error}); set a smaller "
            "host_memory"
        ) from error
    if host_slots.refusal is not None:
        warnings.warn(
            f"host memory for experts ({host_bytes}) could not be pinned "
            f"({host_slots.refusal}): copies to {streams.device} go through the driver's own "
            "buffer, at a fraction of the link's rate, and the host waits for each; raise ulimit "
            "-l, or set a smaller host_memory",
            stacklevel=4,
        )
    engine = TieredEngine(
        tensor_map,
        streams,
        source,
        device_slots,
        host_slots,
        policy,
        MissPlanner(tiers.miss),
        blobs=host.blobs,
    )
    budget = replace(budget, num_slots=device_slots.num_slots)
    if budget.holds_all:
        engine.fill()
    return engine, budget


def plan_host_slots(
    host_memory: ExpertMemory, tensor_map: TensorMap, budget: Budget, available_bytes: int
) -> int:
    """Host slots within `host_memory`: for 'auto' every expert if they fit what is free.

    Fewer where the device holds every expert. Raises BudgetError below the experts of one token in
    one layer, and above what is free.
    """
    kind, num_experts = budget.kind.behind, tensor_map.num_experts
    floor_bytes = kind.bytes_of(budget.floor_slots)
    reserve = max(_HOST_RESERVE_BYTES, int(_HOST_RESERVE_SHARE * available_bytes))
    wanted = host_memory.resolve(
        expert_total_bytes=kind.bytes_of(num_experts), available_bytes=available_bytes - reserve
    )
    if wanted < floor_bytes:
        raise BudgetError(
            f"{format_bytes(max(wanted, 0))} of host memory for experts is below the floor of "
            f"{format_bytes(floor_bytes)}, what one token uses in one layer; set "
            f"host_memory={floor_bytes} or more"
        )
    if wanted > available_bytes:
        raise BudgetError(
            f"{format_bytes(wanted)} of host memory for experts do not fit in the "
            f"{format_bytes(available_bytes)} that are free; set "
            f"host_memory={max(available_bytes - reserve, floor_bytes)} or less, or 'auto'"
        )
    num_slots = min(kind.num_slots(wanted), num_experts)
    if host_memory == ExpertMemory() and budget.holds_all:
        num_slots = min(num_slots, max(_PASSING_SLOTS, budget.floor_slots))
    return num_slots


def _device_slots(
    tensor_map: TensorMap, budget: Budget, streams: Streams, *, may_shrink: bool
) -> DeviceSlots:
    kind, num_slots = budget.kind, budget.num_slots
    while True:
        try:
            return _allocate(tensor_map, budget, num_slots, streams)
        except DeviceMemoryError as error:
            fitting = (error.free_bytes - _DEVICE_RESERVE_BYTES) // kind.slot_bytes
            if not may_shrink or min(fitting, num_slots - 1) < budget.floor_slots:
                raise BudgetError(
                    f"{num_slots} expert slots take {format_bytes(error.asked_bytes)} on "
                    f"{streams.device} and {format_bytes(error.free_bytes)} are free, which "
                    f"{_fits(fitting, budget)}"
                ) from error
            # Memory in pieces: what is free in sum may not be free in one run.
            num_slots = max(budget.floor_slots, min(fitting, int(0.95 * num_slots)))


def _allocate(
    tensor_map: TensorMap, budget: Budget, num_slots: int, streams: Streams
) -> DeviceSlots:
    """The slots, behind what stands beside them. Raises DeviceMemoryError."""
    kind, blobs = budget.kind, budget.kind.behind.blobs
    room = landing = None
    if isinstance(blobs, PackedMap):
        unpack = find_unpack(streams.device)
        assert unpack is not None, "packed experts, and nothing unpacks them"
        landing = PackedLanding(blobs.slot_bytes, streams, unpack)
    elif isinstance(blobs, ScaledMap):
        dequantizer = find_dequantizer(tensor_map.formats(), streams.device)
        room = DeviceRoom(blobs.computed_bytes, streams, dequantizer)
        if kind.room_bytes:  # else only restore() needs it
            room.reserve()
    return DeviceSlots(num_slots, kind.slot_bytes, streams, room=room, landing=landing)


def _fits(num_slots: int, budget: Budget) -> str:
    if num_slots < budget.floor_slots:
        return (
            f"is too little for the {budget.floor_slots} experts that one token uses in one layer "
            f"({format_bytes(budget.kind.bytes_of(budget.floor_slots))}); end other programs "
            "there, or use the CPU"
        )
    return (
        f"has room for {num_slots} beside activations; set "
        f"expert_memory={budget.kind.bytes_of(num_slots)} or less, or 'auto'"
    )
