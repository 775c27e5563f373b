"""`moe-runtime` under torchrun."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_runtime.cli.demo import CHECKPOINT
from moe_runtime.measure.probe import collectives
from moe_runtime.measure.probe.collectives import CollectiveSizes
from moe_runtime.placement_map import Placement
from moe_runtime.trace_file import Member, write_npz
from tests.command_line import ROOT, Outcome, command, environment, run_here
from tests.parallel.rank_pool import free_port
from tests.tiny_checkpoint import NUM_EXPERTS, NUM_LAYERS, save_mixtral

PROMPTS = ["first", "a second, longer one", "3"]
OPTIONS = ("--dtype", "float32", "--max-new-tokens", "5")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixtral(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def prompts_file(folder: Path) -> Path:
    file = folder / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    return file


def torchrun(*arguments: str | Path, num_ranks: int) -> Outcome:
    """As a shell runs it."""
    starter = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks))
    done = subprocess.run(
        [sys.executable, *starter, "-m", "moe_runtime", *map(str, arguments)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def found(folder: Path, prompts_file: Path) -> dict[str, Any]:
    placement = folder / "placement.json"
    Placement(
        model="tiny",
        num_experts=NUM_EXPERTS,
        num_hidden_layers=NUM_LAYERS,
        layer_ids=tuple(range(NUM_LAYERS)),
        gpus=2,
        nodes=1,
        slots=np.tile(np.arange(NUM_EXPERTS)[::-1], (NUM_LAYERS, 1)),
    ).save(placement)
    options = ("--placement", placement, "--prompts", prompts_file, *OPTIONS, "--json")
    outcome = torchrun("generate", folder, *options, "--pipeline", "2", num_ranks=2)
    assert outcome.code == 0, outcome.err
    one_object: dict[str, Any] = json.loads(outcome.out)  # nothing else is on stdout
    return one_object


def test_results_are_those_of_one_process_in_input_order(
    capsys: pytest.CaptureFixture[str], folder: Path, prompts_file: Path, found: dict[str, Any]
) -> None:
    alone = run_here(capsys, "generate", folder, "--prompts", prompts_file, *OPTIONS, "--json")
    expected = json.loads(alone.out)["results"]
    assert [result["prompt"] for result in found["results"]] == PROMPTS
    assert [result["rank"] for result in found["results"]] == [0, 1, 0]
    for result, one in zip(found["results"], expected, strict=True):
        assert {name: result[name] for name in one} == one
    assert found["is_terminated"] is False


def test_bytes_stand_beside_what_formulas_say(found: dict[str, Any]) -> None:
    """Law: matrices of ranks with nothing on the diagonal, and sums that agree with them."""
    parallel = found["parallel"]
    assert parallel["ranks"] == 2
    assert parallel["experts_held"] == [NUM_LAYERS * NUM_EXPERTS // 2] * 2
    assert parallel["bytes"][0][0] == parallel["bytes"][1][1] == 0
    total = sum(map(sum, parallel["bytes"]))
    assert total == parallel["bytes_within_node"] + parallel["bytes_between_nodes"]
    assert (
        parallel["moe_bytes"] == parallel["moe_predicted_bytes"] == sum(parallel["per_layer_bytes"])
    )
    assert 0 < parallel["moe_bytes"] < total
    assert [rank["prompts"] for rank in found["ranks"]] == [2, 1]
    assert parallel["payload"] == "exact"
    assert parallel["experts_moved"] == parallel["migration_bytes"] == 0
    assert parallel["forwards_by_chunks"] == {"2": parallel["forwards"]}


def test_each_rank_says_its_memory_and_what_it_read_from_disk(found: dict[str, Any]) -> None:
    """Law: what its cache asked for is among what the system counted as read by the process."""
    for rank in found["ranks"]:
        memory = rank["memory"]
        assert memory["peak_rss_bytes"] >= memory["rss_after_imports_bytes"] > 0
        if memory["read_from_disk_bytes"] is not None and found["settings"]["direct_reads"]:
            assert memory["read_from_disk_bytes"] >= rank["cache"]["bytes_read"] > 0


def test_messages_are_probed_and_the_file_serves_a_generation(
    capsys: pytest.CaptureFixture[str],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Law: one object or a table, and a file that generate --pipeline takes."""
    meeting = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (meeting | {"MASTER_PORT": str(free_port())}).items():
        monkeypatch.setenv(name, value)
    small = CollectiveSizes(num_bytes=(4096, 8192), rows=(1, 2), weight_shape=(8, 8), repeats=1)
    monkeypatch.setattr(
        collectives, "probe_collectives", partial(collectives.probe_collectives, sizes=small)
    )
    file = tmp_path / "interconnect.yaml"
    shown = run_here(capsys, "probe", "--collectives", "-o", file)
    assert shown.code == 0, shown.err
    for words in ("1 ranks on 1 node(s), gloo, cpu", "all_to_all", "reduce_scatter", "8 x 8"):
        assert words in shown.out
    said = json.loads(run_here(capsys, "probe", "--collectives", "--json").out)
    assert (said["ranks"], said["backend"]) == (1, "gloo")
    options = ("--prompt", "a", "--dispatch", "auto", "--pipeline", file, *OPTIONS, "--json")
    parallel = json.loads(run_here(capsys, "generate", folder, *options).out)["parallel"]
    assert sum(parallel["forwards_by_chunks"].values()) == parallel["forwards"] > 0
    assert (
        "cannot be read"
        in run_here(
            capsys, "generate", folder, *options[:4], "--pipeline", tmp_path / "nowhere"
        ).error()
    )


def test_tables_share_prompts_out_or_move_rows_between_shares_of_attention(
    folder: Path, prompts_file: Path, found: dict[str, Any]
) -> None:
    """Law: the same texts in input order, and local activations of seen and unseen ids apart."""
    rng = np.random.default_rng(0)
    tables = folder / "tables.npz"
    by_id, by_pair = (NUM_LAYERS, 100), (NUM_LAYERS, 2, 2)
    fields = {
        "token_group": rng.integers(0, 2, by_id).astype(np.int32),
        "token_confidence": np.ones(by_id, np.float32),
        "bigram_group": rng.integers(0, 2, by_pair).astype(np.int32),
        "bigram_confidence": np.ones(by_pair, np.float32),
    }
    write_npz(tables, [Member.of(name, array) for name, array in fields.items()])
    given = ("--tables", tables, "--prompts", prompts_file, *OPTIONS, "--json")
    for attention in ("data", "tensor"):
        outcome = torchrun("generate", folder, "--attention", attention, *given, num_ranks=2)
        assert outcome.code == 0, outcome.err
        one = json.loads(outcome.out)
        texts = [result["text"] for result in one["results"]]
        assert texts == [result["text"] for result in found["results"]]
        parallel = one["parallel"]
        assert parallel["dispatch"] == "speculative"
        assert parallel["moe_bytes"] == parallel["moe_predicted_bytes"] > 0
        assert (parallel["attention_bytes"] > 0) is (attention == "tensor")
        rates = parallel["local_activation_rate"]
        assert rates["of_equal_parts"] == 0.5
        assert 0 < rates["seen"] < 1
        prompts = [rank["prompts"] for rank in one["ranks"]]
        assert sorted(prompts) == ([0, 3] if attention == "tensor" else [1, 2])


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        (("--dispatch", "auto"), "fast"),
        (("--dispatch", "auto", "--exact"), "exact"),
        (("--attention", "tensor", "--dtype", "float32"), "fast"),
    ],
    ids=["fast", "exact", "tensor"],
)
def test_a_check_compares_all_ranks_with_the_unmodified_model(
    prompts_file: Path, options: tuple[str, ...], mode: str
) -> None:
    """Law: tokens and logits of every prompt, wherever it ran; the figures are of the run alone."""
    given = ("--prompts", prompts_file, "--max-new-tokens", "3", *options, "--check", "--json")
    outcome = torchrun("generate", CHECKPOINT, *given, num_ranks=2)
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    parity = found["parity"]
    assert parity["mode"] == mode
    assert parity["tokens_compared"] == 3 * len(PROMPTS)
    assert sorted(result["index"] for result in found["results"]) == [0, 1, 2]
    if mode == "exact":
        assert parity["identical"] is True
        assert parity["max_abs_logit_diff"] == 0
    else:
        assert parity["greedy_tokens_equal"] is True
        assert parity["positions"] >= (0 if "float32" in options else 200)
        assert found["parallel"]["forwards"] == (9 if "tensor" in options else 6)


def test_experts_move_while_texts_are_written(
    folder: Path, prompts_file: Path, found: dict[str, Any]
) -> None:
    """Law: the same texts, and every expert that another rank holds from then on is counted."""
    # Experts were in descending order: all but the middle ones of an odd number change places.
    even = np.tile(np.array([0, 1, 5, 2, 3, 4]), (NUM_LAYERS, 1))
    placement = replace(Placement.load(folder / "placement.json"), slots=even)
    placement.save(folder / "other.json")
    files = ("--placement", folder / "placement.json", "--migrate", folder / "other.json")
    given = (*files, "--prompts", prompts_file, *OPTIONS)
    outcome = torchrun("generate", folder, *given, "--migrate-after", "3", "--json", num_ranks=2)
    assert outcome.code == 0, outcome.err
    one = json.loads(outcome.out)
    assert [r["text"] for r in one["results"]] == [r["text"] for r in found["results"]]
    assert one["parallel"]["migrations"] == 1
    assert one["parallel"]["experts_moved"] == 2 * NUM_LAYERS
    late = torchrun("generate", folder, *given, "--migrate-after", "99", num_ranks=2)
    assert late.code == 0, late.err
    assert "--migrate-after 99 was not reached: there were 10 forwards" in late.err


def test_a_migration_needs_ranks_and_a_placement(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    alone = run_here(capsys, "generate", folder, "--prompt", "a", "--migrate", "other.json")
    assert "--migrate other.json has no effect on one process" in alone.error()
    nothing = run_here(capsys, "generate", folder, "--prompt", "a", "--migrate-after", "3")
    assert "--migrate-after 3 has no effect alone; name a placement" in nothing.error()


def test_the_scripts_are_shell() -> None:
    """Law: every example passes bash's own check, and hands its arguments on."""
    scripts = sorted((ROOT / "scripts").glob("torchrun_*.sh"))
    assert [script.name for script in scripts] == [
        "torchrun_one_node.sh", "torchrun_slurm.sh", "torchrun_two_nodes.sh"
    ]  # fmt: skip
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)
        assert '-m moe_runtime generate "$@"' in script.read_text()


def test_sigterm_ends_at_the_next_token_with_what_was_written(folder: Path) -> None:
    """Law: exit code 143, and one object with the results so far."""
    prompts = folder / "many.txt"
    prompts.write_text("\n".join(f"prompt {number}" for number in range(2000)))
    meeting = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    options = ("--prompts", prompts, "--dispatch", "auto", "--max-new-tokens", "40", "--json")
    running = subprocess.Popen(
        command("generate", folder, *options),
        cwd=ROOT,
        env=environment() | meeting | {"MASTER_PORT": str(free_port())},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stderr is not None
    while "rank 0 of 1" not in (line := running.stderr.readline()):
        assert line, "it ended before it had loaded"
    running.send_signal(signal.SIGTERM)
    out, _ = running.communicate(timeout=600)
    assert running.returncode == 143
    found = json.loads(out)
    assert found["is_terminated"] is True
    assert len(found["results"]) < 2000
    assert all(one["finish_reason"] != "terminated" for one in found["results"][:-1])
