"""Models on the CPU as if it were an accelerator with tiers behind it."""

import random

import pytest

from moe_runtime.integrations.transformers import install, load, offload
from moe_runtime.integrations.transformers.device_tiers import build_tiers
from moe_runtime.integrations.transformers.tiered_maths import choose_tiered_maths
from moe_runtime.memory.expert_source import DiskSource
from tests.fake_streams import FakeMachine, FakeStreams

PLENTY_BYTES = 2**40


def put_tiers_below(monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    """What `load` and `offload` set up until the test ends; work runs as it is queued."""
    machine = FakeMachine(random.Random(0), is_eager=True)

    def build(tensor_map, budget, tiers, policy, reader, device):  # type: ignore[no-untyped-def]
        return build_tiers(
            tensor_map,
            budget,
            tiers,
            policy,
            FakeStreams(machine),
            DiskSource(budget.kind.behind.blobs or tensor_map, reader),
            available_host_bytes=PLENTY_BYTES,
        )

    def choose(*sites, exact, layers=()):  # type: ignore[no-untyped-def]
        return choose_tiered_maths(*sites, exact=exact)

    monkeypatch.setattr(install, "build_engine", build)
    for module in (load, offload):
        monkeypatch.setattr(module, "choose_maths", choose)
        monkeypatch.setattr(module, "has_tiers", lambda device: True)
    return machine
