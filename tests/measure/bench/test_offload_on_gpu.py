"""The offload benchmark where a GPU computes, with a CPU in its place and tiers over fakes."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_runtime.errors import BudgetError
from moe_runtime.integrations.transformers import tiered_maths
from moe_runtime.measure.bench import offload_benchmark, rounds, sitting
from moe_runtime.measure.bench.contestant_process import Turn
from moe_runtime.measure.bench.job import Job
from moe_runtime.measure.bench.link_rate import LinkRate
from moe_runtime.measure.bench.markdown import remarks, title
from moe_runtime.measure.bench.offload_benchmark import run_offload_benchmark
from moe_runtime.measure.bench.presets import load_preset
from moe_runtime.measure.bench.random_checkpoint import write_random_checkpoint
from moe_runtime.measure.bench.report import Caps, Outcome
from moe_runtime.measure.bench.routing import read_routings
from moe_runtime.measure.bench.settings import Progress, Settings
from moe_runtime.measure.bench.worker import _Worker
from moe_runtime.measure.peers.accelerate_host import resident_experts
from moe_runtime.measure.peers.catalog import GPU_PEERS, PEERS, choose_peers
from tests.fake_tiers import put_tiers_below
from tests.measure.bench.test_gpu_experts import CPU_AS_GPU
from tests.small_preset import small_preset


class InThisProcess:
    """A worker without a process of its own, on the CPU instead of a GPU."""

    group = None

    def __init__(self, module: str, *, group: None, log: Path) -> None:
        assert group is None
        self._worker = _Worker(module)
        self._worker._do_import({})

    def __enter__(self) -> "InThisProcess":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def own_bytes(self) -> int:
        return 0

    peak_resident_bytes = own_bytes

    def cpu_seconds(self) -> float:
        return 0.0

    def load(self, job: Job) -> dict[str, Any]:
        assert job.device == "cuda"
        message = replace(job, device="cpu").as_message()
        facts: dict[str, Any] = self._worker._do_load({"job": message})["facts"]
        return facts

    def run(self, tokens: Any, *, logits: Path | None = None, **words: Any) -> Turn:
        said = None if logits is None else str(logits)
        done = self._worker._do_run({"tokens": list(tokens), "logits": said, **words})
        return Turn(
            milliseconds=tuple(done["milliseconds"]), bytes_read=0, counters=done["counters"]
        )


@pytest.fixture
def cpu_as_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    put_tiers_below(monkeypatch)
    monkeypatch.setattr(tiered_maths, "find_grouped", lambda *_: "a CPU")
    monkeypatch.setattr(sitting, "ContestantProcess", InThisProcess)
    monkeypatch.setattr(offload_benchmark, "gpu_device", lambda index, nvml: CPU_AS_GPU)
    monkeypatch.setattr(offload_benchmark, "device_available_bytes", lambda device: 2**40)
    monkeypatch.setattr(rounds, "_FEWEST_RATE_SECONDS", 0.01)


def settings(checkpoint: Path, work_folder: Path) -> Settings:
    return Settings(
        device=torch.device("cuda"),
        checkpoint=checkpoint,
        gguf=None,
        no_gguf="not made",
        work_folder=work_folder,
        residencies=[0.65],
        routings=read_routings("uniform"),
        peers=[GPU_PEERS["accelerate"]],
        num_steps=12,
        seconds=30.0,
        equal_totals=False,
        policy="lru",
        predictor="off",
        exact=False,
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "tiny-2"
    return write_random_checkpoint(load_preset("tiny"), folder, num_layers=2)


@pytest.mark.slow
@pytest.mark.usefixtures("cpu_as_gpu")
def test_the_ceiling_is_the_link_and_a_resident_step(checkpoint: Path, tmp_path: Path) -> None:
    """Law: with part of the experts there, ours is held against link and resident step."""
    (table,), _ = run_offload_benchmark(settings(checkpoint, tmp_path), Progress())
    ours, accelerate = table.rows
    assert ours.outcome is accelerate.outcome is Outcome.MEASURED, (ours.note, accelerate.note)
    assert accelerate.times_ours is not None
    assert table.caps is Caps.ENFORCED
    assert ours.facts["host_slots"] == 64
    assert ours.facts["host_pinned"]
    assert 0 < (ours.hit_rate or 0) < 1
    assert ours.bytes_missed_per_token
    assert table.resident_ms is not None
    assert table.link_gbps is not None
    assert table.direct_read_gbps is None
    assert table.ceiling is not None
    assert table.ceiling.ms_per_token.median > table.resident_ms.median / 2
    assert table.prediction is None
    said = "\n".join([title(table), *remarks(table)])
    assert "65% of the weights in the memory of cuda" in said
    assert "the link and a resident step alone would take" in said
    json.dumps(table.as_dict(), allow_nan=False)


@pytest.mark.slow
def test_too_small_a_gpu_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: the reference and everybody's share are there together, or nothing is started."""
    monkeypatch.setattr(offload_benchmark, "device_available_bytes", lambda device: 2**30)
    with pytest.raises(BudgetError, match=r"free on cuda; take fewer --layers or --peers"):
        run_offload_benchmark(settings(checkpoint, tmp_path), Progress())


def test_copies_over_the_link_are_counted() -> None:
    """Law: whole copies in at least the time asked for, and their median for the report."""
    link = LinkRate(CPU_AS_GPU)
    num_bytes, seconds = link.read(0, 0.01)
    assert num_bytes > 0
    assert num_bytes % link.as_list()[0]["copy_bytes"] == 0
    assert seconds >= 0.01
    assert link.as_list()[0]["gbps"] == pytest.approx(num_bytes / seconds / 1e9)


def test_who_runs_on_a_gpu() -> None:
    """Law: accelerate offloads to host memory there, and llama.cpp is not asked for."""
    assert [peer.module for peer in choose_peers("all", "cuda")] == [
        "transformers_resident", "accelerate_host", "deepspeed_zero3", "policylang",
    ]  # fmt: skip
    assert choose_peers("accelerate", "cpu") == [PEERS["accelerate"]]
    with pytest.raises(ValueError, match=r"'llama.cpp' is unknown; choose all, none, or from tran"):
        choose_peers("llama.cpp", "cuda")


def test_accelerate_keeps_first_layers_while_there_is_room() -> None:
    """Law: as many layers as fit beside dense weights and one layer that is copied."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(small_preset("mixtral-8x7b").config())
    everything = sum(p.nbytes for p in (*model.parameters(), *model.buffers()))
    names = resident_experts(model, None)
    assert len(names) == 3
    layer = sum(p.nbytes for p in model.get_submodule(names[0]).parameters())
    assert resident_experts(model, everything) == names[:2]
    assert resident_experts(model, everything - layer) == names[:1]
    assert resident_experts(model, everything - 3 * layer) == []


def test_policylang_gets_slots_within_the_memory(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: its cache is what memory leaves beside dense weights, in experts a layer."""
    attached: list[str] = []
    stub = SimpleNamespace(attach=lambda model, policy: attached.append(policy))
    monkeypatch.setitem(sys.modules, "moe_policylang", stub)
    from moe_runtime.measure.peers import policylang

    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    job = Job(
        device="cpu", checkpoint=checkpoint, gguf=None, scratch=tmp_path, replay=None,
        dtype="bfloat16", policy="lru", predictor="off", exact=False, num_threads=1,
        memory_bytes=size // 2, context_tokens=64,
    )  # fmt: skip
    decoder, facts = policylang.load(job)
    assert attached == [facts["experts"]]
    capacity = int(attached[0].split("capacity = ")[1].split()[0])
    assert 1 <= capacity < 16
    decoder.start("", 0)
    decoder.step(5)
    assert decoder.logits().ndim == 1
