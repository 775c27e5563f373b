"""Laws of pinned memory: pinned while somebody owns it, pageable where the system refuses."""

import gc
import random

import torch

from moe_runtime.memory.pinned_buffer import PinnedBuffer
from moe_runtime.memory.pinned_memory import PinnedMemory
from moe_runtime.memory.pinned_slots import PinnedSlots
from tests.fake_streams import FakeMachine, FakeStreams


def fake_streams(*, can_pin: bool = True) -> FakeStreams:
    return FakeStreams(FakeMachine(random.Random(0)), can_pin=can_pin)


def test_memory_is_unpinned_once() -> None:
    """Law: closing, closing again and forgetting unpin once in all."""
    streams = fake_streams()
    closed, forgotten = PinnedMemory(5000, streams), PinnedMemory(1, streams)
    assert (streams.num_pinned, closed.refusal) == (2, None)
    assert closed.bytes.data_ptr() % 4096 == 0
    closed.close()
    closed.close()
    assert streams.num_pinned == 1
    del forgotten
    gc.collect()
    assert streams.num_pinned == 0


def test_refused_memory_serves_as_well() -> None:
    """Law: where pinning is refused memory is there all the same, and says why it is not pinned."""
    streams = fake_streams(can_pin=False)
    slots = PinnedSlots(2, 64, streams)
    assert slots.refusal == "the test says no"
    slots.blob(1)[:] = 7
    assert slots.bytes(1).eq(7).all()
    assert not slots.bytes(0).any()
    slots.close()
    assert streams.num_pinned == 0


def test_a_slot_is_free_after_all_of_its_copies() -> None:
    """Law: a slot that copies on two streams read is free when both are done, not before."""
    streams = fake_streams()
    slots = PinnedSlots(2, 64, streams)
    never, soon = streams.demand.record(), streams.prefetch.record()
    slots.mark_copy(0, never)
    slots.mark_copy(0, soon)
    assert slots.is_free(1)
    slots.wait_free(0)
    assert never.time_seconds is not None
    assert soon.time_seconds is not None
    assert slots.is_free(0)


def test_a_buffer_grows_and_is_used_again() -> None:
    """Law: one allocation serves tensors up to its size; a larger one comes beside it.

    It may while the device is at work: nothing is unpinned before the end.
    """
    streams = fake_streams()
    buffer = PinnedBuffer(streams)
    first = buffer.tensor((3, 4), torch.float32)
    assert buffer.tensor((2, 2), torch.int64).data_ptr() == first.data_ptr()
    copied = torch.empty_like(first)
    streams.demand.copy_async(copied, first.fill_(7))
    large = buffer.tensor((4096, 2), torch.bfloat16)
    assert large.shape == (4096, 2)
    assert buffer.tensor((0, 5), torch.float32).shape == (0, 5)
    assert streams.num_pinned == 2
    streams.synchronize()
    assert copied.eq(7).all()
    buffer.close()
    assert streams.num_pinned == 0
