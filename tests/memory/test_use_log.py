"""Laws of the use log: what layers used is read in the order in which it was written."""

import random

import torch

from moe_runtime.memory import use_log
from moe_runtime.memory.use_log import UseLog
from tests.fake_streams import FakeMachine, FakeStreams


def test_notes_are_read_in_order_however_late_they_are_written() -> None:
    """Law: every note is read once, oldest first, with its layer's experts; the ring goes round."""
    rng = random.Random(0)
    streams = FakeStreams(FakeMachine(rng))
    log = UseLog(8, streams)
    written, read = [], []
    for _ in range(3 * use_log._NUM_ENTRIES // 2):
        layer, num_experts = rng.randrange(5), rng.randint(1, 8)
        experts = sorted(rng.sample(range(num_experts), rng.randint(0, num_experts)))
        mask_E = torch.zeros(num_experts, dtype=torch.uint8)
        mask_E[experts] = 1
        if log.is_full or rng.random() < 0.001:
            read.extend(log.read())
        log.write(layer, mask_E, streams.compute())
        written.append((layer, experts))
    read.extend(log.read())
    assert read == written


def test_no_wait_after_a_later_sync() -> None:
    """Law: reading does not wait for the device once the host has waited for later work."""
    streams = FakeStreams(FakeMachine(random.Random(1)))
    log = UseLog(4, streams)
    for layer in range(9):
        log.write(layer, torch.ones(4, dtype=torch.uint8), streams.compute())
    streams.compute().synchronize()
    assert [layer for layer, _ in log.read()] == list(range(9))
    assert streams.machine.num_waits == 0
