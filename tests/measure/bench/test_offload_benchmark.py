"""The benchmark on a small model: gates, caps, ratios, and the simulator's word beside them."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_runtime.errors import ContestantError
from moe_runtime.measure.bench import offload_benchmark, rounds
from moe_runtime.measure.bench.contestant_process import ContestantProcess
from moe_runtime.measure.bench.job import Job
from moe_runtime.measure.bench.memory_group import memory_groups
from moe_runtime.measure.bench.offload_benchmark import run_offload_benchmark
from moe_runtime.measure.bench.presets import load_preset
from moe_runtime.measure.bench.random_checkpoint import write_random_checkpoint
from moe_runtime.measure.bench.report import Caps, Comparison, Outcome, Table
from moe_runtime.measure.bench.routing import read_routings
from moe_runtime.measure.bench.settings import Progress, Settings
from moe_runtime.measure.bench.sitting import Seat, Sitting
from moe_runtime.measure.peers.catalog import PEERS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 experts of 5.5 MB in two layers, so that a cap is more than what Python needs."""
    folder = tmp_path_factory.mktemp("bench") / "tiny-2"
    return write_random_checkpoint(load_preset("tiny"), folder, num_layers=2)


@pytest.fixture(autouse=True)
def hardly_any_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are for honest speeds, and no speed is looked at here."""
    monkeypatch.setattr(rounds, "_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(rounds, "_FEWEST_RATE_SECONDS", 0.05)


def run(
    checkpoint: Path,
    work_folder: Path,
    *,
    residency: float = 0.65,
    routing: str = "forced",
    peers: tuple[str, ...] = (),
    exact: bool = False,
) -> tuple[list[Table], list[Comparison]]:
    return run_offload_benchmark(
        Settings(
            device=torch.device("cpu"),
            checkpoint=checkpoint,
            gguf=None,
            no_gguf="not made",
            work_folder=work_folder,
            residencies=[residency],
            routings=read_routings(routing),
            peers=[PEERS[name] for name in peers],
            num_steps=24,
            seconds=30.0,
            equal_totals=False,
            policy="lru",
            predictor="off",
            exact=exact,
        ),
        Progress(),
    )


@contextmanager
def no_groups() -> Iterator[None]:
    """In the place of `memory_groups` where none can be made."""
    yield None


def caps_are_possible() -> bool:
    with memory_groups() as groups:
        return groups is not None


def test_under_equal_caps_there_are_speeds_ratios_and_a_ceiling(
    checkpoint: Path, tmp_path: Path
) -> None:
    if not caps_are_possible():
        pytest.skip("this process may not make control groups")
    pytest.importorskip("accelerate")
    (table,), _ = run(checkpoint, tmp_path, peers=("transformers", "accelerate"), exact=True)
    assert table.caps is Caps.ENFORCED
    ours, accelerate, resident = table.rows
    assert ours.outcome is accelerate.outcome is Outcome.MEASURED
    assert ours.gate is not None
    assert ours.gate.is_bit_equal
    assert ours.times_ours is None
    assert accelerate.times_ours is not None
    assert resident.outcome is Outcome.ABSENT
    for row in (ours, accelerate):
        assert row.cap_bytes == table.weight_bytes + (row.own_bytes or 0)
        assert (row.peak_memory_bytes or 0) <= row.cap_bytes
        assert row.num_tokens >= 6
    assert ours.bytes_read_over_missed == pytest.approx(1, abs=0.01)
    if table.direct_read_gbps is not None:
        assert table.ceiling is not None
    assert not list(tmp_path.iterdir())


def test_without_caps_there_is_no_ratio(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And replayed rows are simulated: hit for hit what the real cache did."""
    monkeypatch.setattr(offload_benchmark, "memory_groups", no_groups)
    (uniform, again), (comparison,) = run(
        checkpoint,
        tmp_path,
        routing=f"uniform,trace:{uniform_trace(tmp_path)}",
        peers=("accelerate",),
    )
    for table in (uniform, again):
        assert table.as_dict()["capped"] is False
        assert all(row.times_ours is None for row in table.rows)
        assert table.prediction is not None
        assert table.prediction.hit_rate == table.ours.hit_rate
    # Each routing is priced at the disk's rate beside its own turns, so the ratio is not 1.
    times = [table.prediction.ms_per_token for table in (uniform, again)]
    assert comparison.predicted == pytest.approx(times[0] / times[1])
    json.dumps(uniform.as_dict(), allow_nan=False)


def test_with_all_weights_nobody_is_capped_and_ours_stands_beside_transformers(
    checkpoint: Path, tmp_path: Path
) -> None:
    (table,), _ = run(checkpoint, tmp_path, residency=1.0, peers=("transformers", "accelerate"))
    assert table.as_dict()["capped"] is None
    names = [row.name for row in table.rows]
    assert names == ["moe_runtime", "transformers-eager", "transformers-grouped_mm", "accelerate"]
    ours, eager, grouped, accelerate = table.rows
    assert eager.times_ours is not None
    assert grouped.times_ours is not None
    assert ours.bytes_read_per_token == 0
    assert accelerate.outcome is Outcome.ABSENT


def test_altered_weights_turn_the_gate_red_and_there_is_no_speed(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours is given a copy in which one expert's matrix differs."""
    altered = shutil.copytree(checkpoint, tmp_path / "altered")
    file = max(altered.glob("*.safetensors"))
    tensors = load_file(file)
    for name in tensors:
        if ".experts." in name:
            tensors[name] = tensors[name] * 1.5
    save_file(tensors, file, metadata={"format": "pt"})
    job_of = Sitting._job_of

    def other_checkpoint(self: Sitting, seat: Seat) -> Job:
        return replace(job_of(self, seat), checkpoint=altered)

    monkeypatch.setattr(Sitting, "_job_of", other_checkpoint)
    (table,), _ = run(checkpoint, tmp_path / "work")
    assert table.ours.outcome is Outcome.RED
    assert table.ours.ms_per_token is None
    assert table.ceiling is None


def test_a_contestant_that_its_cap_kills_needs_more(checkpoint: Path, tmp_path: Path) -> None:
    with memory_groups() as groups:
        if groups is None:
            pytest.skip("this process may not make control groups")
        group = groups.new("resident")
        log = tmp_path / "log"
        with ContestantProcess("transformers_resident", group=group, log=log) as process:
            process.limit(process.own_bytes() + 100 * 2**20)
            with pytest.raises(ContestantError, match="needs more than") as caught:
                process.load(job(checkpoint, tmp_path))
    assert caught.value.is_memory


def test_a_contestant_that_fails_says_why(tmp_path: Path) -> None:
    with (
        ContestantProcess("transformers_resident", group=None, log=tmp_path / "log") as process,
        pytest.raises(ContestantError, match="nowhere") as caught,
    ):
        process.load(job(tmp_path / "nowhere", tmp_path))
    assert not caught.value.is_memory


def job(checkpoint: Path, scratch: Path, **changes: Any) -> Job:
    return Job(
        device="cpu",
        checkpoint=checkpoint,
        gguf=None,
        scratch=scratch,
        replay=None,
        dtype="bfloat16",
        policy="lru",
        predictor="off",
        exact=False,
        num_threads=1,
        memory_bytes=None,
        context_tokens=64,
        **changes,
    )


def uniform_trace(folder: Path) -> Path:
    """A file with the draws that `uniform` makes, for 2 layers of 32 experts, top-2."""
    (routing,) = read_routings("uniform")
    trace = routing.rows(num_rows=24, num_layers=2, num_experts=32, top_k=2)
    assert trace is not None
    trace.save(folder / "uniform.npz")
    return folder / "uniform.npz"
