"""A plan is tried before it is kept, never slower than the defaults, and arguments always win."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_runtime
from moe_runtime import warm_start
from moe_runtime.measure import plan_trial, planned_load
from moe_runtime.measure.plan_trial import Candidate, run_trials
from moe_runtime.measure.plan_verdict import recall
from moe_runtime.perf.hardware_presets import load_hardware_preset
from tests.command_line import run_here

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "moe_runtime" / "demo" / "mixtral-stdlib"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that need not be measured, and few steps."""
    machine = load_hardware_preset("2-core-epyc")
    monkeypatch.setattr(planned_load, "this_machine", lambda folder, read_bytes: machine)
    monkeypatch.setattr(plan_trial, "_NUM_TOKENS", 6)


def planned(**arguments: Any) -> dict[str, Any]:
    model = moe_runtime.load(DEMO, plan="auto", **arguments)
    with closing(moe_runtime.handle(model)) as handle:
        found: dict[str, Any] = handle.report()
    return found


def test_the_report_shows_predicted_beside_measured() -> None:
    plan = planned(expert_memory="40%")["plan"]
    first, *others = plan["trials"]
    assert first["arguments"] == {}
    assert first["predicted_tokens_per_second"] is None
    assert 1 <= len(others) <= 2
    for trial in others:
        # The trial's context is shorter than the one that was planned for.
        assert trial["predicted_tokens_per_second"] > trial["planned_tokens_per_second"] > 0
        assert trial["measured_tokens_per_second"] == pytest.approx(1 / min(trial["step_seconds"]))
    chosen = plan["trials"][plan["chosen"]]["step_seconds"]
    assert all(own <= default for own, default in zip(chosen, first["step_seconds"], strict=True))


def test_arguments_that_were_given_stay() -> None:
    found = planned(expert_memory="40%", policy="lfu", linears=False)
    assert found["cache"]["policy"] == "lfu"
    assert found["cache"]["slots"] == 19
    given = {"expert_memory", "policy", "linears"}
    assert all(not given & set(trial["arguments"]) for trial in found["plan"]["trials"])


def test_tokens_of_a_planned_model_are_the_models() -> None:
    tokens = torch.arange(10).reshape(1, 10)
    texts = []
    for plan in ("off", "auto"):
        model = moe_runtime.load(DEMO, plan=plan, dtype="float32")
        with closing(moe_runtime.handle(model)):
            texts.append(model.generate(tokens, max_new_tokens=12, do_sample=False).tolist())  # type: ignore[operator]
    assert texts[0] == texts[1]


def test_a_plan_that_measures_slower_than_the_defaults_is_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seconds = iter([2.0, 2.5, 1.99, 1.99, 2.5, 2.0])  # of 0, 1, 2 and back
    monkeypatch.setattr(plan_trial, "_median_step_seconds", lambda model, tokens: next(seconds))
    candidates = [Candidate(arguments={})] * 3

    def load(**arguments: Any) -> Any:
        return moe_runtime.load(DEMO, **arguments)

    chosen, trials = run_trials(load, candidates)
    assert chosen == 0  # 0.5 % is chance
    assert [trial.measured_tokens_per_second for trial in trials] == [0.5, 0.4, 1 / 1.99]
    seconds = iter([2.0, 2.5, 1.0, 2.1, 2.5, 2.0])  # faster in one round alone
    assert run_trials(load, candidates)[0] == 0
    seconds = iter([2.0, 2.5, 1.5, 1.6, 2.5, 2.0])
    assert run_trials(load, candidates)[0] == 2


def test_a_verdict_is_kept_and_another_machines_is_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = planned(expert_memory="40%")["plan"]
    (file,) = warm_start.default_folder().glob("plan-*.json")

    def no_trials(*_: Any) -> Any:
        raise AssertionError("the verdict was there")

    with monkeypatch.context() as patched:
        patched.setattr(planned_load, "run_trials", no_trials)
        again = planned(expert_memory="40%")["plan"]
    assert json.loads(json.dumps(again)) == json.loads(json.dumps(first))
    sound = file.read_text()
    assert recall(file, first["fingerprint"], first["available_bytes"] // 2) is None  # too little
    for damaged in (
        sound.replace(first["fingerprint"], "0" * 16),
        sound[:100],
        "[]",
        json.dumps({**json.loads(sound), "chosen": 7}),
    ):
        file.write_text(damaged)
        caplog.clear()
        assert recall(file, first["fingerprint"], 2**40) is None
        assert f"{file} is ignored" in caplog.text


def test_other_wishes_are_tried_anew() -> None:
    one = planned(expert_memory="40%")["plan"]["fingerprint"]
    assert planned(expert_memory="50%")["plan"]["fingerprint"] != one


def test_nothing_is_kept_where_nothing_is_to_be_kept() -> None:
    planned(expert_memory="40%", warm_start=False)
    assert not list(warm_start.default_folder().glob("plan-*.json"))


def test_generate_leaves_what_stands_on_the_command_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    done = run_here(
        capsys, "generate", DEMO, "--prompt", "def read(", "--plan", "auto", "--expert-memory",
        "40%", "--policy", "lfu", "--max-new-tokens", "4", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["settings"]["policy"] == "lfu"
    assert found["cache"]["slots"] == 19
    assert found["plan"]["trials"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"plan": "best"}, "plan 'best' is unknown; choose from off, auto"),
        ({"plan": "auto", "dispatch": "auto"}, "is for one process and dispatch for several"),
        ({"plan": "auto", "expert_memory": "1KiB"}, "the smallest budget that works is 331776"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        moe_runtime.load(DEMO, **arguments)
