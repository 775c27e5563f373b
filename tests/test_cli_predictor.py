"""Laws of `moe-runtime predictor`: what its commands print, write and refuse."""

import json
from pathlib import Path

import numpy as np
import pytest

from moe_runtime.predictors import path_network, path_training
from moe_runtime.predictors.registry import PREDICTORS
from moe_runtime.trace import Phase, Trace
from tests.command_line import Outcome, run_here
from tests.predictors.planted import by_id, planted

DEMO = Path(__file__).resolve().parents[1] / "moe_runtime" / "demo" / "mixtral-stdlib"
PROMPTS = ["def read(path):", "import os", "class Error(Exception):", "    return None", "for x in"]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    planted(by_id).save(tmp_path / "T.npz")
    return tmp_path / "T.npz"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace of the bundled model, with what its routers saw."""
    from moe_runtime.cli.app import main

    folder = tmp_path_factory.mktemp("recorded")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    words = ["--prompts", folder / "prompts.txt", "-o", folder / "T.npz", "--hidden"]
    words += ["--max-new-tokens", "12", "--temperature", "1", "--seed", "0", "--json"]
    assert main(["trace", "record", str(DEMO), *map(str, words)]) == 0
    return folder / "T.npz"


def predictor(capsys: pytest.CaptureFixture[str], *words: str | Path) -> Outcome:
    return run_here(capsys, "predictor", *words)


def test_list_names_every_predictor_and_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(predictor(capsys, "list", "--json").out)["predictors"]
    assert [one["predictor"] for one in found] == list(PREDICTORS)
    needs = {one["predictor"]: one["needs"] for one in found}
    assert needs["token_table"] == ["topk", "token_id"]
    assert all(one["what"] for one in found)
    assert "routing_path" in predictor(capsys, "list").out


def test_eval_judges_on_held_out_sequences(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--predictors", "random,frequency,token_table", "--json", "--plot", tmp_path / "r.png"]
    outcome = predictor(capsys, "eval", trace, *words)
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert found["tokens_fitted"] + found["tokens_judged"] == 30 * 20
    assert found["slots_per_layer"] == 2
    by_name = {one["predictor"]: one for one in found["results"]}
    table = by_name["token_table"]["scores"]["decode"]["step"]
    assert table["recall"] > 0.95
    assert table["recall"] > by_name["random"]["scores"]["decode"]["step"]["recall"] + 0.5
    assert table["batch_chance"]["4"] == pytest.approx(1 - 0.75**4)
    assert set(by_name["token_table"]["scores"]) >= {"all", "prefill", "decode", "seen ids"}
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_eval_shows_a_table(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = predictor(capsys, "eval", trace, "--predictors", "frequency,markov")
    assert outcome.code == 0, outcome.err
    assert "markov" in outcome.out
    assert "chance" in outcome.out


def test_a_trained_file_is_judged_and_its_split_is_watched(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "P.safetensors"
    outcome = predictor(capsys, "train", trace, "--predictor", "markov", "-o", file, "--json")
    assert json.loads(outcome.out)["bytes"] == file.stat().st_size
    same = predictor(capsys, "eval", trace, "--predictors", file, "--json")
    assert "another split" not in same.err
    other = predictor(capsys, "eval", trace, "--predictors", file, "--seed", "3", "--json")
    assert "fitted with another split" in " ".join(other.err.split())
    fresh = predictor(capsys, "eval", trace, "--predictors", "markov", "--json")
    scores = [json.loads(o.out)["results"][0]["scores"] for o in (same, fresh)]
    assert scores[0] == scores[1]


def test_the_bundled_model_s_gates_choose_what_was_recorded(
    recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`model_facts` refuses gates that do not; here it accepts them, and they see ahead."""
    words = ["--predictors", "gate_lookahead,frequency", "--model", DEMO, "--json"]
    outcome = predictor(capsys, "eval", recorded, *words)
    assert outcome.code == 0, outcome.err
    gates, frequency = (one["scores"]["all"] for one in json.loads(outcome.out)["results"])
    assert gates["1"]["recall"] > frequency["1"]["recall"] + 0.1
    # A person sees beside that how alike what the gates are shown is to what they were made for.
    shown = predictor(capsys, "eval", recorded, *words[:-1]).out
    cosine = json.loads(outcome.out)["router_input_cosines"]["1"][0]
    assert f"{cosine:.3f}" in shown.split("mean cosine")[1]


def test_a_predicted_trace_has_the_prompts_tokens_and_no_layer_runs(
    recorded: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, output = tmp_path / "P.safetensors", tmp_path / "predicted.npz"
    words = ["--predictor", "token_table", "--model", DEMO, "-o", file]
    assert predictor(capsys, "train", recorded, *words).code == 0
    prompts = recorded.parent / "prompts.txt"
    monkeypatch.setattr("torch.nn.Module.__call__", None)  # no module may run
    words = ["--predictor", file, "--prompts", prompts, "-o", output, "--json"]
    outcome = predictor(capsys, "trace", DEMO, *words)
    assert outcome.code == 0, outcome.err
    predicted, true = Trace.load(output), Trace.load(recorded)
    in_prompt = true.phase == Phase.PREFILL
    assert predicted.token_id is not None
    assert true.token_id is not None
    np.testing.assert_array_equal(predicted.token_id, true.token_id[in_prompt])
    np.testing.assert_array_equal(predicted.sequence_id, true.sequence_id[in_prompt])
    assert predicted.model == true.model
    assert json.loads(outcome.out)["rows"] == predicted.num_tokens
    # Fitted to most of these very tokens, it cannot be far off.
    hits = (predicted.topk[..., None] == true.topk[in_prompt][:, :, None]).any(-1)
    assert hits.mean() > 0.5


def test_a_network_is_trained_with_a_bar_and_traced(
    recorded: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(path_training, "_TOKENS", 1)
    monkeypatch.setattr(path_network, "_WIDTH", 32)
    file, output = tmp_path / "P.safetensors", tmp_path / "predicted.npz"
    words = ["--predictor", "routing_path", "-o", file, "--json"]
    assert predictor(capsys, "train", recorded, *words).code == 0
    words = ["--predictor", file, "--prompts", recorded.parent / "prompts.txt", "-o", output]
    outcome = predictor(capsys, "trace", DEMO, *words)
    assert outcome.code == 0, outcome.err
    assert "routing_path" in outcome.out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--predictors", "oracle"], "there is no predictor 'oracle'"),
        (["--predictors", "gate_lookahead"], "gate_lookahead needs the field hidden"),
        (["--predictors", "absent.safetensors"], "absent.safetensors cannot be read"),
        (["--held-out", "0"], "held-out share 0.0 must be above 0"),
        (["--plot", "recall.txt"], "ends in none of"),
    ],
)
def test_eval_refuses(
    words: list[str], says: str, trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in predictor(capsys, "eval", trace, *words).error()


def test_a_predictor_of_another_model_is_refused(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = tmp_path / "P.safetensors", tmp_path / "predicted.npz"
    assert predictor(capsys, "train", trace, "--predictor", "frequency", "-o", file).code == 0
    (tmp_path / "p.txt").write_text("hello")
    words = ["--predictor", file, "--prompts", tmp_path / "p.txt", "-o", output]
    said = predictor(capsys, "trace", DEMO, *words).error()
    assert "it is of planted, 4 layers" in said
    assert "wanted is mixtral-stdlib" in said
    assert not output.exists()


def test_too_few_sequences_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planted(by_id, num_sequences=2).save(tmp_path / "few.npz")
    assert "needs 5; record more" in predictor(capsys, "eval", tmp_path / "few.npz").error()


def test_an_output_is_checked_before_work_starts(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--predictor", "markov", "-o", tmp_path / "no" / "P.safetensors"]
    assert "there is no folder" in predictor(capsys, "train", trace, *words).error()
