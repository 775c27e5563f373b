"""What slots on a device may hold, and host slots behind them."""

from collections.abc import Sequence
from dataclasses import replace

from moe_runtime.errors import UnsupportedModelError
from moe_runtime.integrations.transformers.budget import SlotKind, check_wanted
from moe_runtime.integrations.transformers.choice import computes_compact
from moe_runtime.layer import LayerMath
from moe_runtime.memory.packed_map import PackedMap
from moe_runtime.memory.scaled_map import ScaledMap
from moe_runtime.memory.tensor_map import TensorMap
from moe_runtime.tiered_math import TieredMath

_NUM_LANDINGS = 2  # one for each stream of copies


def device_slot_kinds(
    tensor_map: TensorMap,
    maths: Sequence[LayerMath | TieredMath | None],
    wanted: str = "auto",
    *,
    expert_dtype: str = "auto",
    can_unpack: bool,
) -> list[SlotKind]:
    """What slots may hold for `maths`, the best first. Raises UnsupportedModelError.

    Quantised experts stay as they are stored, on the host and on the device. Packed ones stay
    packed on the host, so that the link carries less, if the device `can_unpack`: there they are
    unpacked when they arrive, and nothing is left to do when they are used. `wanted`, one of
    SLOT_KINDS, may forbid or demand that.
    """
    check_wanted(wanted, expert_dtype)
    if expert_dtype != "auto":
        raise UnsupportedModelError(
            f"expert_dtype={expert_dtype!r} is for slots in host memory, and the experts are on a "
            "GPU; leave it out, or compute on the CPU"
        )
    hosts = [
        (math.host, layer)
        for math, layer in zip(maths, tensor_map.layers, strict=True)
        if isinstance(math, TieredMath) and math.host is not None
    ]
    host_in_place = computes_compact([host for host, _ in hosts], [layer for _, layer in hosts])
    scaled = ScaledMap.of(tensor_map)
    if scaled is not None and wanted != "packed":
        name, room_bytes = "+".join(tensor_map.formats()), scaled.computed_bytes
        host = SlotKind(name, scaled.slot_bytes, scaled, 0 if host_in_place else room_bytes)
        is_read_in_place = all(
            isinstance(math, TieredMath) and math.grouped is not None for math in maths
        )
        return [replace(host, room_bytes=0 if is_read_in_place else room_bytes, host=host)]
    plain = SlotKind("unpacked", tensor_map.slot_bytes)
    packed = PackedMap.of(tensor_map) if can_unpack and wanted != "unpacked" else None
    if packed is None:
        if wanted == "packed":
            raise UnsupportedModelError(
                "expert_slots='packed' needs experts that are packed and computed as they are "
                "stored, and Triton to unpack them on the device; pack the model (moe-runtime "
                "pack) and load it in bfloat16, or leave expert_slots out"
            )
        return [plain]
    host_room_bytes = 0 if host_in_place else tensor_map.slot_bytes
    host = SlotKind("packed", packed.slot_bytes, packed, host_room_bytes)
    landing_bytes = _NUM_LANDINGS * packed.slot_bytes
    kept = SlotKind("unpacked", tensor_map.slot_bytes, None, landing_bytes, host)
    return [kept] if wanted == "packed" else [kept, plain]
