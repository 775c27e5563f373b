"""Laws of `moe-runtime placement`: what its commands print, write and refuse."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moe_runtime.cli.placement_options import FormatName, ObjectiveName
from moe_runtime.cli.terminal import Meter
from moe_runtime.integrations.placement_formats import FORMATS
from moe_runtime.placement.evaluate import evaluate
from moe_runtime.placement.objective import OBJECTIVES
from moe_runtime.placement_map import Placement
from moe_runtime.trace import Trace
from moe_runtime.trace_split import split_by_sequence
from tests.command_line import Outcome, environment, run_here
from tests.placements import REPLICATED_ROWS, assert_same, small_placement
from tests.routed_traces import routed_trace

Capsys = pytest.CaptureFixture[str]

FIGURES = {
    "crossings_per_token", "crossing_fraction", "inter_node_fraction", "fanout",
    "load_max_over_mean", "load_max_over_mean_256", "imbalance_ratio", "local_activation_rate",
    "per_layer", "per_domain",
}  # fmt: skip
SOLVED = {"lower_bound", "gap", "status", "stopped_by", "solver", "seconds"}


def placement(capsys: Capsys, verb: str, *arguments: str | Path) -> Outcome:
    return run_here(capsys, "placement", verb, *arguments)


def test_every_format_and_objective_has_its_option() -> None:
    """Law: the command line offers exactly what there is."""
    assert [name.value for name in FormatName] == list(FORMATS)
    assert [name.value for name in ObjectiveName] == list(OBJECTIVES)


def test_export_and_import_again(capsys: Capsys, tmp_path: Path) -> None:
    """Law: a placement survives SGLang's file; --like says what that file leaves out."""
    ours = small_placement(REPLICATED_ROWS, made={"solver": "search"})
    ours.save(tmp_path / "ours.json")
    outcome = placement(
        capsys, "export", tmp_path / "ours.json", "--to", "sglang", "-o", tmp_path / "s.json",
        "--json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["redundant_experts"] == 2
    assert list(json.loads((tmp_path / "s.json").read_text())) == ["physical_to_logical_map"]
    outcome = placement(
        capsys, "import", tmp_path / "s.json", "--from", "sglang", "--gpus", "2",
        "--like", tmp_path / "ours.json", "-o", tmp_path / "back.json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "2 layers of 4 experts in 6 slots on 2 GPUs" in " ".join(outcome.out.split())
    assert_same(Placement.load(tmp_path / "back.json"), ours)


def test_import_tells_duplicates(capsys: Capsys, tmp_path: Path) -> None:
    """Law: an expert twice on a GPU is let in, as EPLB makes such maps, and said."""
    (tmp_path / "list.json").write_text("[[0, 0, 3, 1, 2, 1]]")
    outcome = placement(
        capsys, "import", tmp_path / "list.json", "--from", "vllm-list", "--gpus", "2", "-o",
        tmp_path / "p.json", "--json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["has_duplicates"] is True
    assert "slots[0] has expert 0 twice on GPU 0" in " ".join(outcome.err.split())


def test_bad_files_and_outputs(capsys: Capsys, tmp_path: Path) -> None:
    """Law: one sentence; outputs are tried before work starts."""
    small_placement().save(tmp_path / "p.json")
    absent = tmp_path / "absent" / "out"
    for words, said in (
        (("export", tmp_path / "p.json", "--to", "sglang", "-o", absent), "there is no folder"),
        (
            ("export", tmp_path / "no.json", "--to", "eplb", "-o", tmp_path / "x.pt"),
            "cannot be read",
        ),
        (
            ("export", tmp_path / "p.json", "--to", "nccl", "-o", tmp_path / "x"),
            "'nccl' is not one",
        ),
        (
            ("import", tmp_path / "p.json", "--from", "sglang", "-o", tmp_path / "x.json"),
            "has no physical_to_logical_map",
        ),
        (("import", tmp_path / "p.json", "--from", "sglang", "-o", absent), "there is no folder"),
    ):
        assert said in placement(capsys, *words).error()  # type: ignore[arg-type]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["p.json"]


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    routed_trace().save(tmp_path / "T.npz")
    return tmp_path / "T.npz"


def solve(capsys: Capsys, folder: Path, *arguments: str | Path) -> Outcome:
    return placement(capsys, "solve", *arguments, "-o", folder / "p.json", "--time-limit", "5")


def test_solve_writes_a_placement_and_says_what_it_is(
    capsys: Capsys, trace_file: Path, tmp_path: Path
) -> None:
    """Law: figures are the library's, on what was solved for and on whole sequences held out."""
    outcome = solve(capsys, tmp_path, trace_file, "--gpus", "4", "--balance", "1.4", "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert found.keys() >= FIGURES | SOLVED
    written = Placement.load(tmp_path / "p.json")
    assert (written.model, written.gpus, written.num_slots) == ("planted", 4, 8)
    assert written.made["status"] == found["status"] == "optimal"
    assert written.made["traces"] == ["T.npz"]
    assert written.made["balance"] == 1.4
    learn, held_out = split_by_sequence(Trace.load(trace_file), 0.2)
    assert held_out is not None
    for facts, tokens in ((found, learn), (found["held_out"], held_out)):
        expected = evaluate(written, [tokens])
        assert facts["num_tokens"] == tokens.num_tokens
        for name in FIGURES - {"per_layer", "per_domain"}:
            assert facts[name] == pytest.approx(getattr(expected, name)), name
        assert [layer["layer_id"] for layer in facts["per_layer"]] == [0, 1, 2, 3]
        assert set(facts["per_domain"]) == {"code", "law"}
    assert found["crossing_fraction"] < 0.5  # at random 0.75
    assert found["lower_bound"] <= found["objective_value"]
    assert all(max(layer["gpu_load"]) <= 1.4001 * sum(layer["gpu_load"]) / 4
               for layer in found["per_layer"])  # fmt: skip


def test_solve_as_a_table(capsys: Capsys, trace_file: Path, tmp_path: Path) -> None:
    """Law: without --json a person reads status, bound, both columns and domains."""
    outcome = solve(capsys, tmp_path, trace_file, "--gpus", "4")
    assert outcome.code == 0, outcome.err
    for text in ("optimal, stopped by proof", "no placement is below", "held out", "code", "law"):
        assert text in outcome.out


def test_options_of_solve(capsys: Capsys, trace_file: Path, tmp_path: Path) -> None:
    """Law: nodes, replicas, weights, an old placement and a topology reach the problem."""
    base = (trace_file, "--gpus", "4", "--json")
    outcome = solve(capsys, tmp_path, *base, "--nodes", "2", "--replicas", "4", "--weight", "law=3")
    found = json.loads(outcome.out)
    assert (found["nodes"], found["num_slots"]) == (2, 12)
    assert found["domain_weights"] == {"law": 3.0}
    assert found["inter_node_fraction"] <= found["crossing_fraction"]
    assert Placement.load(tmp_path / "p.json").duplicate() is None
    solve(capsys, tmp_path, *base)
    first = Placement.load(tmp_path / "p.json")
    (tmp_path / "p.json").rename(tmp_path / "old.json")
    dear = ("--from", tmp_path / "old.json", "--move-cost", "1000", "--hold-out", "0.5")
    outcome = solve(capsys, tmp_path, *base, *dear)
    assert outcome.code == 0, outcome.err
    assert (Placement.load(tmp_path / "p.json").gpu_of() == first.gpu_of()).all()
    costs = [[0 if a == b else 1 + abs(a - b) for b in range(4)] for a in range(4)]
    (tmp_path / "costs.json").write_text(json.dumps({"rank_cost_matrix": costs}))
    outcome = solve(capsys, tmp_path, *base, "--topology", tmp_path / "costs.json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["cost_per_transition"] > 0


def test_several_traces_count_together(capsys: Capsys, trace_file: Path, tmp_path: Path) -> None:
    """Law: each trace is split on its own; other models are refused."""
    routed_trace(1).save(tmp_path / "U.npz")
    outcome = solve(capsys, tmp_path, trace_file, tmp_path / "U.npz", "--gpus", "4", "--json")
    found = json.loads(outcome.out)
    assert found["num_tokens"] + found["held_out"]["num_tokens"] == 2 * 1200
    routed_trace(1, model="other").save(tmp_path / "V.npz")
    assert "the traces are of different models: model is 'planted' and 'other'" in solve(
        capsys, tmp_path, trace_file, tmp_path / "V.npz", "--gpus", "4"
    ).error()  # fmt: skip


def test_warnings(capsys: Capsys, tmp_path: Path) -> None:
    """Law: few tokens, nothing held out, and a load above the limit elsewhere are said."""
    file = tmp_path / "few.npz"
    routed_trace(5, num_sequences=4, tokens_each=10).save(file)
    outcome = solve(capsys, tmp_path, file, "--gpus", "4", "--balance", "1.2", "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    said = " ".join(outcome.err.split())
    assert "20 tokens are fewer than 100 for each of the 8 experts" in said
    assert "on held-out sequences the busiest GPU has" in said
    assert "above the limit 1.2" in said
    assert len(found["warnings"]) >= 2
    assert found["held_out"]["load_max_over_mean"] > 1.2
    routed_trace(num_sequences=1, tokens_each=900).save(file)
    outcome = solve(capsys, tmp_path, file, "--gpus", "4", "--json")
    assert "nothing is held out" in " ".join(outcome.err.split())
    assert json.loads(outcome.out)["held_out"] is None


def test_bad_input(capsys: Capsys, trace_file: Path, tmp_path: Path) -> None:
    """Law: one line with the thing, the value, the limit and the remedy; and no output."""
    routed_trace(num_experts=6, num_families=3).save(tmp_path / "six.npz")
    topk = routed_trace().topk.copy()
    topk[:, 2] = -1
    Trace.of({"topk": topk}, num_experts=8).save(tmp_path / "hole.npz")
    for name, matrix in (
        ("wide", [[0, 1, 1], [1, 0, 1]]),
        ("minus", [[0, -1], [1, 0]]),
        ("two", [[0, 1], [1, 0]]),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps({"rank_cost_matrix": matrix}))
    small_placement().save(tmp_path / "small.json")
    text = (tmp_path / "small.json").read_text()
    (tmp_path / "v9.json").write_text(text.replace('"version": 1', '"version": 9'))
    before = sorted(tmp_path.iterdir())
    for words, said in (
        ((tmp_path / "six.npz", "--gpus", "4"), "work: 1, 2, 3, 6; or give --replicas 2"),
        ((tmp_path / "hole.npz", "--gpus", "4"), "layer 2"),
        ((tmp_path / "absent.npz", "--gpus", "4"), "cannot be read"),
        ((trace_file, "--gpus", "4", "--balance", "1.0001"), "1.0001"),
        ((trace_file, "--gpus", "4", "--balance", "0.5"), "give 1 or more, such as 1.1"),
        ((trace_file, "--gpus", "2", "--topology", tmp_path / "wide.json"), "must be square"),
        ((trace_file, "--gpus", "2", "--topology", tmp_path / "minus.json"), "at least 0"),
        ((trace_file, "--gpus", "4", "--topology", tmp_path / "two.json"), "for 2 GPUs, and"),
        ((trace_file, "--gpus", "4", "--nodes", "3"), "4 GPUs do not divide among 3 nodes"),
        ((trace_file, "--gpus", "4", "--from", tmp_path / "small.json"), "previous placement has"),
        ((trace_file, "--gpus", "4", "--from", tmp_path / "v9.json"), "version 9"),
        ((trace_file, "--gpus", "4", "--move-cost", "1"), "needs the previous placement"),
        ((trace_file, "--gpus", "4", "--weight", "coding"), "write coding=2"),
        ((trace_file, "--gpus", "4", "--weight", "poems=2"), "no domain 'poems'"),
        ((trace_file, "--gpus", "4", "--solver", "magic"), "magic"),
        ((trace_file, "--gpus", "4", "--solver", "ilp:GUROBI"), "GUROBI"),
        ((trace_file, "--gpus", "4", "--objective", "cocluster"), "no token ids"),
        ((trace_file, "--gpus", "4", "--hold-out", "1"), "less than 1"),
        ((trace_file, "--gpus", "4", "--plot", tmp_path / "p.txt"), "name it"),
    ):  # fmt: skip
        assert said in solve(capsys, tmp_path, *words).error(), words
    assert sorted(tmp_path.iterdir()) == before


def test_outputs_are_tried_first(capsys: Capsys, tmp_path: Path) -> None:
    """Law: an output that cannot be written is said before a trace is opened."""
    for option in ("-o", "--plot"):
        words = ["absent.npz", "--gpus", "2", option, tmp_path / "no" / "p.png"]
        if option == "--plot":
            words += ["-o", tmp_path / "p.json"]
        assert "there is no folder" in placement(capsys, "solve", *words).error()


def test_cocluster_uses_token_ids(capsys: Capsys, tmp_path: Path) -> None:
    """Law: with token ids the co-clustering objective is solved, and tables are written."""
    routed_trace(with_token_ids=True).save(tmp_path / "T.npz")
    words = ("--gpus", "4", "--objective", "cocluster", "--tables", tmp_path / "tables.npz")
    outcome = solve(capsys, tmp_path, tmp_path / "T.npz", *words)
    assert outcome.code == 0, outcome.err
    with np.load(tmp_path / "tables.npz") as tables:
        assert tables["token_group"].shape == (4, 12)
        assert tables["bigram_group"].shape == (4, 4, 4)
        assert tables["token_confidence"].max() <= 1
    routed_trace().save(tmp_path / "U.npz")
    words = ("--gpus", "4", "--tables", tmp_path / "tables.npz")
    assert "needs token ids" in solve(capsys, tmp_path, tmp_path / "U.npz", *words).error()


def test_evaluate_any_placement(capsys: Capsys, trace_file: Path, tmp_path: Path) -> None:
    """Law: a placement made by hand is judged on any trace of its model."""
    row = list(range(8))
    Placement(
        model="planted", num_experts=8, num_hidden_layers=4, layer_ids=(0, 1, 2, 3), gpus=4,
        nodes=2, slots=np.array([row] * 4),
    ).save(tmp_path / "linear.json")  # fmt: skip
    outcome = placement(capsys, "evaluate", tmp_path / "linear.json", trace_file, "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert found.keys() >= FIGURES | SOLVED
    assert found["status"] is None
    assert 0.6 < found["crossing_fraction"] < 0.9
    table = placement(capsys, "evaluate", tmp_path / "linear.json", trace_file)
    assert "by layer" in table.out
    small_placement().save(tmp_path / "small.json")
    assert "num_experts" in placement(
        capsys, "evaluate", tmp_path / "small.json", trace_file
    ).error()  # fmt: skip


def test_compare(capsys: Capsys, trace_file: Path) -> None:
    """Law: six placements, judged on the same held-out tokens; ours crosses less than linear."""
    outcome = placement(
        capsys, "compare", trace_file, "--gpus", "4", "--balance", "1.4", "--time-limit", "5",
        "--json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    found = {result["name"]: result for result in json.loads(outcome.out)["results"]}
    assert list(found) == ["linear", "round-robin", "random", "EPLB", "ExFlow's objective", "ours"]
    assert len({result["num_tokens"] for result in found.values()}) == 1
    assert found["ours"]["crossing_fraction"] < found["linear"]["crossing_fraction"]
    table = placement(capsys, "compare", trace_file, "--gpus", "4", "--balance", "1.4")
    for name in found:
        assert name in table.out


def test_a_plot_is_drawn(capsys: Capsys, trace_file: Path, tmp_path: Path) -> None:
    """Law: --plot writes the picture beside the placement."""
    outcome = solve(capsys, tmp_path, trace_file, "--gpus", "4", "--plot", tmp_path / "p.png")
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_solving_loads_no_torch(trace_file: Path, tmp_path: Path) -> None:
    """Law: solve, evaluate and text exports run where there is no torch."""
    script = (
        "import sys\n"
        "from moe_runtime.cli.app import main\n"
        "assert 'numpy' not in sys.modules\n"
        f"T, P, S = {str(trace_file)!r}, 'p.json', 's.json'\n"
        "assert main(['placement', 'solve', T, '--gpus', '4', '-o', P, '--json']) == 0\n"
        "assert main(['placement', 'evaluate', P, T, '--json']) == 0\n"
        "assert main(['placement', 'export', P, '--to', 'sglang', '-o', S]) == 0\n"
        "import os\n"
        "assert os.environ['OPENBLAS_NUM_THREADS'] == '1'  # set before numpy looked\n"
        "loaded = [name for name in ('torch', 'transformers') if name in sys.modules]\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True,
        timeout=120, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_an_interrupt_keeps_the_best_so_far(
    capsys: Capsys, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Law: Ctrl-C while searching ends with code 130, and the best placement is written."""
    routed_trace(num_layers=6, num_experts=32, top_k=4).save(tmp_path / "T.npz")
    presses = iter([True])

    def press_once(*_: object) -> None:
        if next(presses, False):
            raise KeyboardInterrupt

    monkeypatch.setattr(Meter, "update", press_once)
    words = (tmp_path / "T.npz", "--gpus", "8", "--solver", "search", "--json")
    outcome = solve(capsys, tmp_path, *words)
    assert outcome.code == 130, outcome.err
    assert json.loads(outcome.out)["stopped_by"] == "interrupted"
    assert "the best placement so far is in" in " ".join(outcome.err.split())
    assert Placement.load(tmp_path / "p.json").made["stopped_by"] == "interrupted"
