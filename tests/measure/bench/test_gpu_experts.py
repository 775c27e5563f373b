"""The kernel benchmark's GPU half, interpreted: what it compares, and what it refuses."""

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from moe_runtime.integrations.transformers import device
from moe_runtime.measure.bench import gpu_experts
from moe_runtime.measure.bench.gpu_experts import (
    GpuExpertsReport,
    measure_gpu_experts,
    random_experts,
)
from moe_runtime.measure.probe import gpu_rate
from moe_runtime.measure.probe.gpu_rate import GpuDevice
from tests.command_line import run_here
from tests.small_preset import small_preset
from tests.tiered_world import needs_interpreter

Capsys = pytest.CaptureFixture[str]

CPU_AS_GPU = GpuDevice(
    device=torch.device("cpu"),
    name="Interpreter",
    memory_bytes=2**30,
    compute_capability="0.0",
    multiprocessors=1,
    free_bytes=2**24,
    facts=None,
    synchronize=lambda: None,
    pinned=lambda num_bytes: torch.empty(num_bytes, dtype=torch.uint8),
)
PRESET = small_preset("olmoe-1b-7b")


@pytest.fixture(scope="module")
def report() -> Iterator[GpuExpertsReport]:
    """The interpreter takes tenths of a second a layer, and cuts bfloat16 off without rounding."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_experts, "_TOKENS", (1,))
        patch.setattr(gpu_experts, "_NUM_CALLS", 2)
        patch.setattr(gpu_experts, "_GATE_TOKENS", 2)
        patch.setattr(gpu_experts, "_DTYPE", torch.float16)
        yield measure_gpu_experts(
            PRESET, CPU_AS_GPU, rounds=1, prefill_tokens=2, on_round=lambda done, total: None
        )


@needs_interpreter
def test_experts_are_compared_with_reads_and_grouped_mm(report: GpuExpertsReport) -> None:
    """Law: bytes are those of the experts in use, and outputs are held against float32."""
    assert report.experts == "triton"
    assert set(report.errors) == {"eager", "grouped_mm", "moe_runtime"}
    assert report.is_green
    assert not replace(report, errors={**report.errors, "moe_runtime": 1.0}).is_green
    (one,) = report.decode
    down = random_experts(PRESET, CPU_AS_GPU.device).get_parameter("down_proj")
    assert one.layer_bytes == PRESET.top_k * 3 * down[0].nbytes
    assert one.share.median > 0


@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v2-lite"])
def test_every_preset_has_a_layer_of_experts(name: str) -> None:
    """Law: dense layers that come first are passed over, and weights are numbers."""
    module = random_experts(small_preset(name), torch.device("cpu"))
    assert all(p.isfinite().all() and p.std() > 0 for p in module.parameters())


@needs_interpreter
def test_the_command_shows_what_was_measured(
    capsys: Capsys, monkeypatch: pytest.MonkeyPatch, report: GpuExpertsReport
) -> None:
    """Law: one JSON object, or tables; on a red gate no speed."""
    found = report
    monkeypatch.setattr(device, "single_device", lambda wanted: torch.device(wanted))
    monkeypatch.setattr(gpu_rate, "gpu_device", lambda index, nvml: CPU_AS_GPU)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda wanted: CPU_AS_GPU.name)
    monkeypatch.setattr(gpu_experts, "measure_gpu_experts", lambda *_, **__: found)
    words = ("bench", "kernels", "--device", "cuda")
    outcome = run_here(capsys, *words, "--json")
    assert outcome.code == 0, outcome.err
    said = json.loads(outcome.out)
    assert said["steps"] is said["resident"] is None
    assert said["gpu"]["gpu"] == said["machine"]["gpu"] == "Interpreter"
    assert said["gpu"]["is_green"]
    table = run_here(capsys, *words)
    assert "share of reads" in table.out
    assert "times grouped_mm" in table.out
    assert "RED" not in table.out
    found = replace(report, errors={**report.errors, "moe_runtime": 1.0})
    assert run_here(capsys, *words).out.count("RED") == len(found.decode) + len(found.prefill_ms)


@pytest.mark.parametrize("command", ["kernels", "offload"])
def test_without_a_gpu_it_says_so(capsys: Capsys, command: str) -> None:
    """Law: a GPU that is not there is refused in one line, before anything is made."""
    if torch.cuda.device_count():
        pytest.skip("there is a GPU")
    outcome = run_here(capsys, "bench", command, "--device", "cuda")
    assert outcome.code != 0
    assert "device 'cuda' is not available to torch" in outcome.error()
