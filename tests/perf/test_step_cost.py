"""Laws of step costs: by the rates of the hardware file and the overheads, or a named field."""

from dataclasses import replace
from pathlib import Path

import pytest

import moe_runtime
from moe_runtime.errors import ConfigError
from moe_runtime.integrations.transformers.spec_reader import read_spec
from moe_runtime.perf.hardware import Gpu, Hardware
from moe_runtime.perf.latency import ExpertForm, LatencyModel, Setup
from moe_runtime.perf.overheads import CPU_OVERHEADS
from moe_runtime.perf.rates import Rates
from moe_runtime.perf.step_cost import StepCost

FILE = Path(moe_runtime.__file__).parent / "configs" / "hardware" / "2-core-epyc.yaml"


@pytest.fixture
def machine() -> Hardware:
    """At the pace that overheads are stated for."""
    found = Hardware.load(FILE)
    return replace(found, cpu=replace(found.cpu, operator_nanoseconds=None))


def test_costs_are_bytes_over_measured_rates_and_what_no_rate_explains(machine: Hardware) -> None:
    """Law: products of one bfloat16 row, reads of about an expert's size, and the overheads."""
    cost = StepCost.of(machine, expert_bytes=12_000_000, dense_bytes=30_000_000)
    assert cost.read_seconds == pytest.approx(0.012 / 2.431 + CPU_OVERHEADS.miss_seconds)
    assert cost.expert_seconds == pytest.approx(0.012 / 29.59)
    starting = CPU_OVERHEADS.layer_seconds + CPU_OVERHEADS.row_seconds
    assert cost.dense_seconds == pytest.approx(0.030 / 17.69 + starting)
    assert cost.copy_seconds == 0.0
    assert cost.piece_seconds == 0.0
    pieces = [
        StepCost.of(machine, expert_bytes=12_000_000, dense_bytes=0, piece_bytes=piece_bytes)
        for piece_bytes in (3_000_000, 24_000_000)
    ]
    assert [cost.piece_seconds for cost in pieces] == pytest.approx([0.003 / 2.431, 0.012 / 2.431])
    sped_up = StepCost.of(
        machine, expert_bytes=12_000_000, dense_bytes=30_000_000, uses_kernel=True
    )
    starting = CPU_OVERHEADS.kernel_layer_seconds + CPU_OVERHEADS.row_seconds
    assert sped_up.dense_seconds == pytest.approx(0.030 / 29.59 + starting)


@pytest.mark.parametrize("linears", [False, True])
@pytest.mark.parametrize("num_slots", [200, 1024])
def test_lanes_of_a_trace_and_of_a_plan_cost_the_same(
    machine: Hardware, num_slots: int, linears: bool
) -> None:
    """Law: one model of a step. What differs is attention, which only a plan counts."""
    spec = read_spec("olmoe-1b-7b")
    rates = Rates.of(machine, value_bytes=2, read_bytes=spec.expert_bytes)
    setup = Setup(
        form=ExpertForm.all_of(spec)[0], num_slots=num_slots, num_host_slots=0, batch=1,
        context_tokens=0, linears=linears,
    )  # fmt: skip
    step = LatencyModel(spec, rates).step(setup)
    num_layers = len(spec.layers)
    cost = StepCost.of(
        machine,
        expert_bytes=spec.expert_bytes,
        dense_bytes=spec.step_bytes // num_layers,
        uses_kernel=linears,
    )
    parts = num_layers * cost.dense_seconds + step.missed_experts * cost.read_seconds
    used = spec.experts_per_token if not step.missed_experts else num_layers
    assert step.seconds == pytest.approx(parts + used * cost.expert_seconds, rel=1e-6)


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
    assert cost.expert_seconds == pytest.approx(0.01 / (0.8 * 2000))  # not measured
    bare = replace(machine, gpus=(replace(gpu, pinned_to_gpu_gbps=None),))
    with pytest.raises(ConfigError, match="no pinned_to_gpu_gbps of its G"):
        StepCost.of(bare, expert_bytes=1, dense_bytes=1)


def test_what_was_not_measured_is_named(machine: Hardware) -> None:
    """Law: without a disk there is no cost, and the remedy is named; plain reads stand in, else."""
    with pytest.raises(ConfigError, match=r"no disk.* moe-runtime probe --path"):
        StepCost.of(replace(machine, disk=None), expert_bytes=1, dense_bytes=1)
    cost = StepCost.of(replace(machine, matmul=None), expert_bytes=10**9, dense_bytes=0)
    assert cost.expert_seconds == pytest.approx(1 / (0.8 * machine.memory.read_gbps))
