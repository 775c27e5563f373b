"""Laws of `cache simulate` with a machine, a predictor, or predicted paths."""

import json
from pathlib import Path
from typing import Any

import pytest

import moe_runtime
from moe_runtime.predictors.predictor import ModelFacts
from moe_runtime.predictors.previous_token import PreviousToken
from moe_runtime.predictors.store import save_predictor
from moe_runtime.trace import Trace
from tests.command_line import Outcome, run_here
from tests.simulate.traces import make_trace

MACHINE = Path(moe_runtime.__file__).parent / "configs" / "hardware" / "2-core-epyc.yaml"
ROUNDING = 1e-9  # seconds


@pytest.fixture
def trace(tmp_path: Path) -> Trace:
    found = make_trace(0, num_tokens=60)
    found.save(tmp_path / "T.npz")
    return found


def simulate(capsys: pytest.CaptureFixture[str], file: Path, *arguments: str | Path) -> Outcome:
    return run_here(capsys, "cache", "simulate", file, *arguments)


def facts_of(outcome: Outcome) -> dict[str, Any]:
    assert outcome.code == 0, outcome.err
    found: dict[str, Any] = json.loads(outcome.out)
    return found


@pytest.fixture
def predictor(trace: Trace, tmp_path: Path) -> Path:
    file = tmp_path / "P.safetensors"
    save_predictor(PreviousToken.fit(trace, ModelFacts.of(trace)), file)
    return file


def test_a_machine_adds_time_beside_its_bounds(
    trace: Trace, predictor: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Law: each policy and size is played, with prefetching too, and no bound is beaten."""
    arguments = ("--slots", "6,12", "--policies", "lru,plec", "--json")
    outcome = simulate(
        capsys, tmp_path / "T.npz", *arguments, "--predictor", predictor, "--hardware", MACHINE
    )
    machine = facts_of(outcome)["machine"]
    assert machine["expert_bytes"] > 0
    found = machine["timelines"]
    assert [(one["policy"], one["slots"], one["prefetch"]) for one in found] == [
        ("lru", 6, False),
        ("lru", 12, False),
        ("plec", 6, False),
        ("plec", 12, False),
        ("lru", 6, True),
        ("lru", 12, True),
        ("plec", 6, True),
        ("plec", 12, True),
    ]
    for one in found:
        assert one["seconds"] >= one["perfect_prediction_seconds"] - ROUNDING
        assert one["perfect_prediction_seconds"] >= one["infinite_bandwidth_seconds"]
        assert one["stall_seconds"] >= 0
        assert one["num_steps"] == 60
        is_told = one["prefetch"] or one["policy"] == "plec"
        assert one["predictor"] == ("previous_token" if is_told else None)
        assert one["fetches_more_than_lru"] in (True, False)
        assert one["bytes_fetched_experts"] == one["misses"] + one["prefetches"]


def test_a_table_of_times(trace: Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Law: a person sees a second table, of this machine."""
    outcome = simulate(capsys, tmp_path / "T.npz", "--slots", "9", "--hardware", MACHINE)
    assert outcome.code == 0, outcome.err
    assert "plec, prefetch" in outcome.out


def test_a_predictor_is_told_to_plec(
    trace: Trace, predictor: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Law: plec says whose predictions it was told; the others were told nothing."""
    outcome = simulate(
        capsys, tmp_path / "T.npz", "--slots", "9", "--predictor", predictor, "--json"
    )
    said = {one["policy"]: one["predictor"] for one in facts_of(outcome)["results"]}
    assert said.pop("plec") == "previous_token"
    assert set(said.values()) == {None}


def test_predicted_paths_make_a_queue(
    trace: Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Law: with the true paths for predicted ones queue_belady hits what Belady hits."""
    file = tmp_path / "T.npz"
    outcome = simulate(capsys, file, "--slots", "9", "--predicted-trace", file, "--json")
    hits = {one["policy"]: one["hits"] for one in facts_of(outcome)["results"]}
    assert hits["queue_belady"] == hits["belady"]


def test_what_does_not_fit_is_refused(
    trace: Trace, predictor: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Law: a predictor or paths of another model, or none, are one sentence with the remedy."""
    other, file = tmp_path / "OTHER.npz", tmp_path / "T.npz"
    make_trace(1, num_tokens=9, num_layers=2).save(other)
    slots = ("--slots", "9")
    error = simulate(capsys, other, *slots, "--predictor", predictor).error()
    assert "belongs to another model" in error
    assert "3 layers of 8 experts" in error
    error = simulate(capsys, file, *slots, "--predicted-trace", other).error()
    assert "the predicted trace has 2 layers" in error
    error = simulate(capsys, file, *slots, "--policies", "queue_belady").error()
    assert "give them with --predicted-trace" in error
    (tmp_path / "short").write_bytes(predictor.read_bytes()[:200])
    assert "damaged" in simulate(capsys, file, *slots, "--predictor", tmp_path / "short").error()
    error = simulate(capsys, file, *slots, "--hardware", tmp_path / "none.yaml").error()
    assert "none.yaml" in error
