"""Laws of `moe-runtime cache simulate`: what it prints, writes and refuses."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_runtime.simulate.accesses import Accesses
from moe_runtime.simulate.replay import replay_all
from moe_runtime.trace import Trace
from tests.command_line import Outcome, environment, run_apart, run_here
from tests.simulate.traces import make_trace

KEYS = {"policy", "slots", "hits", "misses", "hit_rate", "bytes_fetched_experts", "seconds"}


@pytest.fixture
def trace(tmp_path: Path) -> Trace:
    found = make_trace(0, num_tokens=60, rows_per_step=4)
    found.save(tmp_path / "T.npz")
    return found


def simulate(capsys: pytest.CaptureFixture[str], file: Path, *arguments: str | Path) -> Outcome:
    return run_here(capsys, "cache", "simulate", file, *arguments)


def results_of(outcome: Outcome) -> list[dict[str, Any]]:
    assert outcome.code == 0, outcome.err
    results: list[dict[str, Any]] = json.loads(outcome.out)["results"]
    return results


def test_json(trace: Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Law: one object with a result a policy and size, the numbers of the library's."""
    arguments = ("--slots", "4, 12,4", "--policies", "lru,belady,static", "--json")
    outcome = simulate(capsys, tmp_path / "T.npz", *arguments)
    results = results_of(outcome)
    expected = replay_all(Accesses.of(trace), slots=[4, 12], policies=["lru", "belady", "static"])
    assert len(results) == len(expected) == 6
    for found, result in zip(results, expected, strict=True):
        assert found.keys() >= KEYS
        assert (found["policy"], found["slots"]) == (result.policy, result.slots)
        assert (found["hits"], found["misses"]) == (result.hits, result.misses)
        assert found["hit_rate"] == result.hits / (result.hits + result.misses)
        assert found["bytes_fetched_experts"] == result.misses
        assert found["sees_future"] == (result.policy != "lru")
        assert found["seconds"] >= 0
        per_layer = [(layer["hits"], layer["misses"]) for layer in found["per_layer"]]
        assert per_layer == list(zip(result.layer_hits, result.layer_misses, strict=True))
    facts = json.loads(outcome.out)
    assert facts["num_tokens"] == 60
    assert facts["num_experts"] == 8
    assert facts["num_accesses"] == results[0]["hits"] + results[0]["misses"]
    assert "has seen the future" in outcome.err


def test_a_table_by_default(
    trace: Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Law: without options all policies are shown, at eighths of all experts."""
    outcome = simulate(capsys, tmp_path / "T.npz")
    assert outcome.code == 0, outcome.err
    for policy in ("lru", "lfu", "static", "adapmoe", "plec", "belady"):
        assert outcome.out.count(policy) == 7
    assert " 21 " in outcome.out
    assert "87.5%" in outcome.out
    assert "6 experts" not in outcome.err
    assert "3 slots are no more than the 4 experts" in outcome.err


def test_steps(trace: Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Law: the file holds every access, and says the same as the counts."""
    steps = tmp_path / "STEPS.npz"
    arguments = ("--slots", "5,9", "--policies", "all", "--steps", steps, "--json")
    results = results_of(simulate(capsys, tmp_path / "T.npz", *arguments))
    with np.load(steps, allow_pickle=False) as file:
        found = dict(file)
    accesses = Accesses.of(trace)
    assert found.keys() - {"step", "layer", "expert"} == {
        f"hit_{result['policy']}_{result['slots']}" for result in results
    }
    assert (np.diff(found["step"]) >= 0).all()
    assert set(found["step"].tolist()) <= set(trace.step.tolist())
    assert found["layer"].tolist() == accesses.layer.tolist()
    assert found["expert"].tolist() == accesses.expert.tolist()
    for result in results:
        is_hit = found[f"hit_{result['policy']}_{result['slots']}"]
        assert is_hit.dtype == np.bool_
        assert is_hit.sum() == result["hits"]
        for layer, counts in enumerate(result["per_layer"]):
            assert is_hit[found["layer"] == layer].sum() == counts["hits"]


@pytest.mark.parametrize("policy", ["lru", "lfu", "static", "adapmoe", "plec"])
def test_steps_show_causality(
    policy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Law: two traces that differ after a step only have the same hits up to it."""
    for name, seed in (("a", 1), ("b", 2)):
        first, second = make_trace(7, num_tokens=40), make_trace(seed, num_tokens=40)
        topk = np.concatenate([first.topk, second.topk])
        Trace.of({"topk": topk}, num_experts=8).save(tmp_path / f"{name}.npz")
    hits = {}
    for name in ("a", "b"):
        steps = tmp_path / f"{name}.steps.npz"
        arguments = ("--slots", "9", "--policies", policy, "--steps", steps)
        earlier = ("--policy-trace", tmp_path / "a.npz")
        assert simulate(capsys, tmp_path / f"{name}.npz", *arguments, *earlier).code == 0
        with np.load(steps, allow_pickle=False) as file:
            hits[name] = file[f"hit_{policy}_9"][file["step"] < 40].tolist()
            assert any(hits[name])
    assert hits["a"] == hits["b"]


def test_policy_trace(trace: Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Law: with a policy trace static no longer knows the trace that it is replayed on."""
    make_trace(1, num_tokens=50).save(tmp_path / "EARLIER.npz")
    arguments = ("--policies", "static", "--slots", "10", "--json")
    with_trace = ("--policy-trace", tmp_path / "EARLIER.npz")
    outcome = simulate(capsys, tmp_path / "T.npz", *arguments, *with_trace)
    (found,) = results_of(outcome)
    assert not found["sees_future"]
    assert "future" not in outcome.err


def test_plot(trace: Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Law: --plot leaves a picture."""
    plot = tmp_path / "hit_rate.png"
    assert simulate(capsys, tmp_path / "T.npz", "--slots", "12", "--plot", plot).code == 0
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_num_experts_overrides_what_is_inferred(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Law: a trace without num_experts is taken for the next common size, unless told."""
    np.savez(tmp_path / "bare.npz", topk=np.array([[[0], [5]]] * 3))
    for arguments, expected in (((), 8), (("--num-experts", "6"), 6)):
        outcome = simulate(
            capsys, tmp_path / "bare.npz", "--slots", "4", "--policies", "lru", "--json", *arguments
        )
        assert json.loads(outcome.out)["num_experts"] == expected


def test_few_slots_are_remarked(
    trace: Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Law: sizes at which next to nothing can hit are allowed, and said to be so."""
    file = tmp_path / "T.npz"
    outcome = simulate(capsys, file, "--slots", "1,30", "--policies", "lfu")
    assert outcome.code == 0
    assert "1 slot is fewer than the 2 experts" in " ".join(outcome.err.split())
    assert "slots" not in simulate(capsys, file, "--slots", "5", "--policies", "lru").err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--slots", "96,x"), "--slots '96,x' is not a list of whole numbers"),
        (("--slots", ""), "is not a list of whole numbers"),
        (("--slots", "0"), "slots is 0; a cache needs at least 1 slot"),
        (("--slots", "-3"), "slots is -3"),
        (("--policies", "lur"), "'lur'; did you mean 'lru'?"),
        (("--policies", ""), "no policy is called ''"),
        (("--policies", "lru,all"), "no policy is called 'all'"),
        (("--num-experts", "3"), "num_experts is 3"),
        (("--policy-trace", "missing.npz"), "missing.npz cannot be read"),
        (("--policy-trace", "other.npz"), "the policy trace has 2 layers of 8 experts"),
        (("--plot", "missing/a.png"), "there is no folder missing"),
        (("--plot", "a.docx"), "ends in none of .png, .svg, .pdf"),
        (("--steps", "missing/a.npz"), "there is no folder missing"),
        (("--steps", "."), "is a folder"),
    ],
)
def test_bad_options(
    trace: Trace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    sentence: str,
) -> None:
    """Law: each mistake is one sentence, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    make_trace(1, num_tokens=5, num_layers=2).save(tmp_path / "other.npz")
    before = sorted(tmp_path.iterdir())
    assert sentence in simulate(capsys, Path("T.npz"), *arguments).error()
    assert sorted(tmp_path.iterdir()) == before


def test_damaged_traces(trace: Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Law: a trace that is missing, cut short, pickled or no trace is one sentence."""
    whole = (tmp_path / "T.npz").read_bytes()
    (tmp_path / "short.npz").write_bytes(whole[: len(whole) // 2])
    np.savez(tmp_path / "pickled.npz", topk=np.array([[[object()]]]))
    np.savez(tmp_path / "other.npz", weights=np.ones(3))
    for name, sentence in (
        ("none.npz", "cannot be read"),
        ("short.npz", "cut short"),
        ("pickled.npz", "pickled"),
        ("other.npz", "has no field topk"),
    ):
        assert sentence in simulate(capsys, tmp_path / name).error()


def test_outputs_are_checked_before_the_trace_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Law: work that could not be kept is not begun."""
    missing = tmp_path / "no" / "a.png"
    error = simulate(capsys, tmp_path / "none.npz", "--plot", missing).error()
    assert f"there is no folder {missing.parent}" in error


def test_as_a_shell_runs_it(trace: Trace, tmp_path: Path) -> None:
    """Law: stdout is one JSON object and nothing else."""
    outcome = run_apart("cache", "simulate", "T.npz", "--slots", "12", "--json", cwd=tmp_path)
    assert len(results_of(outcome)) == 6


def test_a_replay_loads_no_torch(trace: Trace, tmp_path: Path) -> None:
    """Law: caches can be studied where torch is not, and without the seconds that it takes."""
    program = """if True:
        import sys
        from moe_runtime.cli.app import main
        code = main(["cache", "simulate", "T.npz", "--plot", "a.png", "--steps", "s.npz"])
        sys.exit(code or "torch" in sys.modules)
    """
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment(), check=False
    )
    assert done.returncode == 0
