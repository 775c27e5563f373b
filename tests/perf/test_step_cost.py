"""Laws of step costs: bytes over the rates of the hardware file, or a named field."""

from dataclasses import replace
from pathlib import Path

import pytest

import moe_runtime
from moe_runtime.errors import ConfigError
from moe_runtime.perf.hardware import Gpu, Hardware
from moe_runtime.perf.step_cost import StepCost

FILE = Path(moe_runtime.__file__).parent / "configs" / "hardware" / "2-core-epyc.yaml"


@pytest.fixture
def machine() -> Hardware:
    return Hardware.load(FILE)


def test_costs_are_bytes_over_measured_rates(machine: Hardware) -> None:
    """Law: products of one bfloat16 row, and the best reads of the disk."""
    cost = StepCost.of(machine, expert_bytes=12_000_000, dense_bytes=30_000_000)
    assert machine.disk is not None
    assert cost.read_seconds == 0.012 / machine.disk.best.gbps
    assert cost.expert_seconds == pytest.approx(0.012 / 22.59)
    assert cost.dense_seconds == pytest.approx(0.030 / 22.59)
    assert cost.copy_seconds == 0.0
    assert cost.piece_seconds == 0.0
    pieces = [
        StepCost.of(machine, expert_bytes=12_000_000, dense_bytes=0, piece_bytes=piece_bytes)
        for piece_bytes in (3_000_000, 24_000_000)
    ]
    assert [cost.piece_seconds / cost.read_seconds for cost in pieces] == [0.25, 1.0]


def test_a_gpu_computes_and_adds_its_link(machine: Hardware) -> None:
    """Law: with a GPU its rates count, and each expert also crosses the link."""
    gpu = Gpu(
        name="G",
        memory_bytes=2**36,
        compute_capability="9.0",
        memory_read_gbps=2000.0,
        pinned_to_gpu_gbps=50.0,
    )
    cost = StepCost.of(replace(machine, gpus=(gpu,)), expert_bytes=10**7, dense_bytes=10**7)
    assert cost.copy_seconds == 0.01 / 50
    assert cost.expert_seconds == 0.01 / 2000
    bare = replace(machine, gpus=(replace(gpu, pinned_to_gpu_gbps=None),))
    with pytest.raises(ConfigError, match="no pinned_to_gpu_gbps of its G"):
        StepCost.of(bare, expert_bytes=1, dense_bytes=1)


def test_what_was_not_measured_is_named(machine: Hardware) -> None:
    """Law: without a disk there is no cost, and the remedy is named; plain reads stand in else."""
    with pytest.raises(ConfigError, match=r"no disk.* moe-runtime probe --path"):
        StepCost.of(replace(machine, disk=None), expert_bytes=1, dense_bytes=1)
    cost = StepCost.of(replace(machine, matmul=None), expert_bytes=10**9, dense_bytes=0)
    assert cost.expert_seconds == 1 / machine.memory.read_gbps
