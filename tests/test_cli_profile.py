"""`moe-runtime profile` shares steps out among parts, and writes a trace with our lanes in it."""

import json
from pathlib import Path
from typing import Any

import pytest

from moe_runtime.measure.step_parts import PREFIX
from tests.command_line import run_here
from tests.tiny_checkpoint import CONTEXT_TOKENS, NUM_LAYERS, save_mixtral

Capsys = pytest.CaptureFixture[str]
STEPS = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixtral(tmp_path_factory.mktemp("profile") / "model")


def profile(capsys: Capsys, model: Path, *options: str | Path) -> dict[str, Any]:
    outcome = run_here(
        capsys, "profile", model, "--json", "--expert-memory", "40%", "--prompt-tokens", "5",
        "--steps", str(STEPS), *options,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    found: dict[str, Any] = json.loads(outcome.out)
    return found


def test_parts_add_up_and_operators_are_those_of_the_model(capsys: Capsys, model: Path) -> None:
    found = profile(capsys, model, "--batch", "1,3")
    assert [each["batch"] for each in found["batches"]] == [1, 3]
    for each in found["batches"]:
        parts = {part["part"]: part for part in each["parts"]}
        assert set(parts) == {
            "attention", "cache", "embedding", "experts", "lm_head", "norms", "rest", "router",
            "waiting for disk",
        }  # fmt: skip
        assert sum(part["share"] for part in parts.values()) == pytest.approx(1.0)
        total = sum(part["seconds"] for part in parts.values())
        assert total == pytest.approx(each["profiled_step_seconds"])
        operators = {one["name"]: one for one in each["operators"]}
        assert operators["aten::scaled_dot_product_attention"]["calls"] == NUM_LAYERS
        assert each["kernels"] == []
        assert each["tklqt_seconds"] is None
        assert each["hits"] + each["misses"] >= STEPS * NUM_LAYERS
        assert each["tokens_per_second"] == pytest.approx(each["batch"] / each["step_seconds"])
    assert found["transition_batch"] is None
    assert found["tokens"] == "random"


def test_the_trace_has_steps_parts_and_lanes_on_one_clock(
    capsys: Capsys, model: Path, tmp_path: Path
) -> None:
    """Law: what the engine saw of a step lies inside of the profiler's range of it."""
    path, text = tmp_path / "trace.json", tmp_path / "text.txt"
    text.write_text("some words to force\nand more of them\n")
    found = profile(capsys, model, "--trace", path, "--prompts", text)
    assert found["trace"] == str(path)
    assert found["tokens"] == "text"
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("ph") == "X"]
    steps = [e for e in events if e["name"] == f"{PREFIX}step"]
    assert len(steps) == STEPS
    lanes = {e["name"] for e in events if e.get("cat") == "moe_runtime"}
    assert {"expert compute", "cache", "disk reads"} <= lanes
    experts = [e for e in events if e["name"] == f"{PREFIX}experts"]
    assert len(experts) == STEPS * NUM_LAYERS
    slack = 500.0  # microseconds: between two clocks, on a machine that does something else too
    for lane in (e for e in events if e["name"] == "expert compute"):
        assert any(
            e["ts"] - slack <= lane["ts"] and lane["ts"] + lane["dur"] <= e["ts"] + e["dur"] + slack
            for e in experts
        )


def test_a_person_gets_tables_and_a_plot(capsys: Capsys, model: Path, tmp_path: Path) -> None:
    plot = tmp_path / "steps.svg"
    outcome = run_here(
        capsys, "profile", model, "--expert-memory", "40%", "--steps", "2", "--batch", "2",
        "--plot", plot, "--prompt-tokens", "4",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    for word in ("attention", "waiting for disk", "step, profiled", "tokens/s", "aten::"):
        assert word in outcome.out
    assert "waiting for disk" in plot.read_text()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--batch", "0"], "--batch '0' is not a list"),
        (["--batch", "2,2"], "different whole numbers"),
        (["--batch", "1,x"], "write --batch 1,2,4"),
        (["--trace", "no/such/trace.json"], "there is no folder no/such"),
        (["--plot", "steps.txt"], "ends in none of"),
        (["--expert-memory", "lots"], "lots"),
        (["--prompt-tokens", str(CONTEXT_TOKENS)], f"context of {CONTEXT_TOKENS}"),
    ],
)
def test_bad_requests_are_refused_before_the_model_is_loaded(
    options: list[str], sentence: str, capsys: Capsys, model: Path
) -> None:
    outcome = run_here(capsys, "profile", model, *options)
    assert sentence in outcome.error()
    assert "at a time" not in outcome.err  # what is said of a loaded model
