"""Packed experts are unpacked on arrival, whatever else is on its way."""

import random

import torch

from moe_runtime.expert import ExpertKey
from moe_runtime.memory.device_slots import DeviceSlots
from moe_runtime.memory.packed_blob import PackedBlob
from moe_runtime.memory.packed_landing import PackedLanding
from tests.fake_streams import FakeMachine, FakeStreams
from tests.stored_experts import cpu_unpack
from tests.tiered_world import TieredWorld, needs_interpreter

WORLD = TieredWorld(random.Random(0), torch.bfloat16, "packed")
KEYS = [ExpertKey(0, 0), ExpertKey(0, 1), ExpertKey(1, 0), ExpertKey(1, 1)]


def is_right(seed: int, *, is_shared: bool = False) -> bool:
    """Whether four experts on two streams reach their slots in a random order of events."""
    streams = FakeStreams(FakeMachine(random.Random(seed)))
    landing = PackedLanding(max(map(len, WORLD.blobs.values())), streams, cpu_unpack)
    if is_shared:
        landing._memory[streams.prefetch] = landing._memory[streams.demand]
    slots = DeviceSlots(4, WORLD.tensor_map.slot_bytes, streams, landing=landing)
    for slot, key in enumerate(KEYS):
        stream = streams.prefetch if slot % 2 else streams.demand
        blob = torch.from_numpy(WORLD.blobs[key])
        slots.fill(slot, blob, WORLD.blob_map.layout(key), stream, used=None, poison=True)
    streams.synchronize()
    return all(
        torch.equal(value, WORLD.weights[key.layer][key.expert][name])
        for slot, key in enumerate(KEYS)
        for name, value in slots.weights(
            slot, WORLD.tensor_map.layout(key), streams.compute()
        ).items()
    )


def test_streams_land_in_places_of_their_own() -> None:
    """Law: every bit arrives in any order; with one place for both streams it soon does not."""
    assert all(is_right(seed) for seed in range(20))
    assert not all(is_right(seed, is_shared=True) for seed in range(20))


@needs_interpreter
def test_triton_unpacks_what_the_cpu_expands() -> None:
    """Law: in every bit, blocks of one matrix in one launch, and bytes that are not packed."""
    from moe_runtime.kernels.unpack import unpack_into

    launched: list[int] = []

    def unpack(blocks_PB: torch.Tensor, weights_NK: torch.Tensor, rows_per_block: int) -> None:
        launched.append(len(blocks_PB))
        unpack_into(blocks_PB, weights_NK, rows_per_block)

    key = KEYS[0]
    layout = WORLD.blob_map.layout(key)
    assert isinstance(layout.compact, PackedBlob)
    blob = torch.from_numpy(WORLD.blobs[key])
    found, expected = (torch.zeros(layout.num_bytes, dtype=torch.uint8) for _ in range(2))
    layout.compact.unpack(blob, found, unpack)
    layout.compact.expander(layout.parameters, blob, expected)()
    assert torch.equal(found, expected)
    assert len(launched) == 2
    assert sum(launched) == len(layout.compact.blocks) > 2


def test_blocks_of_fewer_rows_end_a_run() -> None:
    """Law: what follows the last block of a matrix is unpacked by itself."""
    layout = WORLD.blob_map.layout(KEYS[0])
    assert isinstance(layout.compact, PackedBlob)
    first, second = layout.compact.blocks[:2]
    assert second.block.num_rows < first.block.num_rows
    assert first.is_followed_by(second, first.block.num_rows)
    assert not second.is_followed_by(first, first.block.num_rows)
