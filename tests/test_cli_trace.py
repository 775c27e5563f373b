"""`moe-runtime trace` records what really ran, and its three commands fit together."""

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_runtime.cli.trace_import import Source
from moe_runtime.measure.trace_import import READERS
from moe_runtime.trace import Phase, Trace
from tests.command_line import Outcome, command, environment, run_here
from tests.tiny_checkpoint import NUM_EXPERTS, NUM_LAYERS, TOP_K, save_mixtral

LENGTHS = (5, 9, 2)
NUM_NEW = 6
START_SECONDS = 120.0

Capsys = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixtral(tmp_path_factory.mktemp("trace") / "tiny-mixtral")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Three prompts of known length; the last has no domain of its own."""
    lines: list[dict[str, str]] = [{"prompt": "x" * length} for length in LENGTHS]
    lines[0]["domain"] = "code"
    lines[1]["domain"] = "law"
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines))
    return file


def trace(capsys: Capsys, verb: str, *arguments: str | Path) -> Outcome:
    return run_here(capsys, "trace", verb, *arguments)


def record(
    capsys: Capsys, model: Path, prompts: Path, output: Path, *options: str
) -> dict[str, Any]:
    outcome = trace(
        capsys, "record", model, "--prompts", prompts, "-o", output, "--json",
        "--max-new-tokens", str(NUM_NEW), "--expert-memory", "40%", *options,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    found: dict[str, Any] = json.loads(outcome.out)
    return found


@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_expert_that_was_used_is_recorded(
    capsys: Capsys, model: Path, prompts: Path, tmp_path: Path, batch_size: int
) -> None:
    """Law: the trace asks for as many experts as the cache was asked for, layer by layer."""
    found = record(capsys, model, prompts, tmp_path / "t.npz", "--batch-size", str(batch_size))
    recorded = Trace.load(tmp_path / "t.npz")
    for layer, counts in enumerate(found["cache"]["per_layer"]):
        used = {
            (int(step), int(expert))
            for step, experts in zip(recorded.step, recorded.topk[:, layer], strict=True)
            for expert in experts
        }
        assert len(used) == counts["hits"] + counts["misses"]
    assert found["rows"] == recorded.num_tokens
    assert found["model"] == recorded.model == model.name
    assert recorded.num_experts == NUM_EXPERTS
    assert recorded.topk.shape[1:] == (NUM_LAYERS, TOP_K)
    assert recorded.hidden is None


def test_batches_and_single_prompts_agree(
    capsys: Capsys, model: Path, prompts: Path, tmp_path: Path
) -> None:
    """Law: a batch adds padding and shares steps; tokens, places and labels are those of each."""
    record(capsys, model, prompts, tmp_path / "one.npz", "--domain", "poems")
    record(capsys, model, prompts, tmp_path / "all.npz", "--domain", "poems", "--batch-size", "3")
    one, together = Trace.load(tmp_path / "one.npz"), Trace.load(tmp_path / "all.npz")
    assert together.num_steps < one.num_steps
    for sequence, (length, domain) in enumerate(
        zip(LENGTHS, ("code", "law", "poems"), strict=True)
    ):
        alone = one.select(one.sequence_id == sequence)
        mine = together.sequence_id == sequence
        shared = together.select(mine & (together.phase != Phase.PADDING))
        assert alone.domain is not None
        assert shared.domain is not None
        assert set(alone.domain) == set(shared.domain) == {domain}
        np.testing.assert_array_equal(alone.token_id, shared.token_id)
        np.testing.assert_array_equal(alone.position, shared.position)
        np.testing.assert_array_equal(alone.phase, shared.phase)
        assert np.count_nonzero(alone.phase == Phase.PREFILL) == length


def test_recording_hidden_states(
    capsys: Capsys, model: Path, prompts: Path, tmp_path: Path
) -> None:
    """Law: --hidden adds the routers' inputs and changes nothing else."""
    record(capsys, model, prompts, tmp_path / "t.npz", "--hidden")
    record(capsys, model, prompts, tmp_path / "without.npz")
    found, without = Trace.load(tmp_path / "t.npz"), Trace.load(tmp_path / "without.npz")
    assert found.hidden is not None
    assert found.hidden.shape == (found.num_tokens, NUM_LAYERS, 32)
    np.testing.assert_array_equal(found.topk, without.topk)


def test_info_of_a_recording(capsys: Capsys, model: Path, prompts: Path, tmp_path: Path) -> None:
    """Law: info counts what was recorded, as a table and as one JSON object."""
    record(capsys, model, prompts, tmp_path / "t.npz", "--hidden")
    outcome = trace(capsys, "info", tmp_path / "t.npz", "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert found["num_sequences"] == len(LENGTHS)
    assert found["num_layers"] == len(found["layers"]) == NUM_LAYERS
    assert found["phases"]["prefill"] == sum(LENGTHS)
    assert found["domains"]["code"] > 0
    assert found["layers"][0]["next_layer_bits"] > 0
    assert found["layers"][-1]["next_layer_bits"] is None
    table = trace(capsys, "info", tmp_path / "t.npz")
    assert table.code == 0
    assert "permuted" in table.out
    assert f"{NUM_EXPERTS} a layer, {TOP_K} a token" in table.out


def test_imported_files_follow_each_other(
    capsys: Capsys, model: Path, prompts: Path, tmp_path: Path
) -> None:
    """Law: importing two traces keeps all rows, and their sequences and steps apart."""
    record(capsys, model, prompts, tmp_path / "t.npz")
    both = tmp_path / "both.npz"
    outcome = trace(
        capsys, "import", tmp_path / "t.npz", tmp_path / "t.npz", "--from", "npz", "-o", both,
        "--json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    once, twice = Trace.load(tmp_path / "t.npz"), Trace.load(both)
    assert json.loads(outcome.out)["tokens"] == twice.num_tokens == 2 * once.num_tokens
    assert json.loads(outcome.out)["sequences"] == 2 * len(LENGTHS)
    assert twice.num_steps == 2 * once.num_steps
    second = twice.select(np.arange(once.num_tokens, twice.num_tokens))
    np.testing.assert_array_equal(second.topk, once.topk)
    np.testing.assert_array_equal(second.sequence_id, once.sequence_id + len(LENGTHS))


def test_importing_csv(capsys: Capsys, tmp_path: Path) -> None:
    """Law: --num-experts says what a CSV file cannot."""
    (tmp_path / "t.csv").write_text("sequence_id,position,layer,expert_0\n4,0,0,1\n4,1,0,3\n")
    outcome = trace(
        capsys, "import", tmp_path / "t.csv", "--from", "csv", "-o", tmp_path / "t.npz",
        "--num-experts", "48",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    found = Trace.load(tmp_path / "t.npz")
    assert found.num_experts == 48
    np.testing.assert_array_equal(found.topk[:, 0, 0], [1, 3])


def test_importing_what_an_engine_recorded(capsys: Capsys, tmp_path: Path) -> None:
    """Law: --model and --domain say what the file cannot; ids in order of size are told."""
    pairs = [[[0, 1 + (n + layer) % 7] for layer in range(2)] for n in range(120)]
    np.save(tmp_path / "request.npy", np.array(pairs, np.uint8))
    outcome = trace(
        capsys, "import", tmp_path / "request.npy", "--from", "vllm", "-o", tmp_path / "t.npz",
        "--num-experts", "8", "--model", "org/name", "--domain", "code",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    found = Trace.load(tmp_path / "t.npz")
    assert found.model == "org/name"
    assert found.domain is not None
    assert set(found.domain) == {"code"}
    assert "the experts of every token are in the order of their ids" in outcome.err


def test_every_reader_has_its_option() -> None:
    """Law: --from offers exactly the readers there are."""
    assert [source.value for source in Source] == list(READERS)


def test_import_refuses_what_does_not_fit_together(
    capsys: Capsys, model: Path, prompts: Path, tmp_path: Path
) -> None:
    """Law: the second of two files that differ is named, and no output appears."""
    record(capsys, model, prompts, tmp_path / "t.npz")
    topk = Trace.load(tmp_path / "t.npz").topk
    np.savez(tmp_path / "bare.npz", topk=topk)
    outcome = trace(
        capsys, "import", tmp_path / "t.npz", tmp_path / "bare.npz", "--from", "npz", "-o",
        tmp_path / "both.npz",
    )  # fmt: skip
    assert "bare.npz does not fit the files before it" in outcome.error()
    assert sorted(path.name for path in tmp_path.glob("*both*")) == []


def test_bad_input_is_named(capsys: Capsys, model: Path, prompts: Path, tmp_path: Path) -> None:
    """Law: outputs are tried before work starts; every mistake is one sentence."""
    absent = tmp_path / "absent" / "t.npz"
    locked = ("record", model, "--prompts", prompts, "-o")
    assert f"there is no folder {absent.parent}; create it" in trace(
        capsys, *locked, absent
    ).error()  # fmt: skip
    assert "is a folder; name a file in it" in trace(capsys, *locked, tmp_path).error()
    assert "there is no folder" in trace(
        capsys, "import", tmp_path / "no.npz", "--from", "npz", "-o", absent
    ).error()  # fmt: skip
    assert "no.npz cannot be read: No such file" in trace(
        capsys, "info", tmp_path / "no.npz"
    ).error()  # fmt: skip
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x", "domain": 7}\n')
    assert "line 1 of" in trace(
        capsys, "record", model, "--prompts", tmp_path / "bad.jsonl", "-o", tmp_path / "t.npz"
    ).error()  # fmt: skip
    assert not (tmp_path / "t.npz").exists()


def test_an_interrupt_keeps_what_was_recorded(model: Path, tmp_path: Path) -> None:
    """Law: Ctrl-C ends a recording; the rows so far stay, under a name of their own."""
    (tmp_path / "p.txt").write_text("\n".join(["a prompt"] * 5000))
    output = tmp_path / "t.npz"
    words = command(
        "trace", "record", model, "--prompts", tmp_path / "p.txt", "-o", output,
        "--max-new-tokens", "40",
    )  # fmt: skip
    process = subprocess.Popen(
        words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        wait_for_rows(tmp_path, process)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=START_SECONDS)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "interrupted" in err
    kept = Trace.load(tmp_path / "t.partial.npz")
    assert f"the {kept.num_tokens} tokens recorded so far are kept in" in " ".join(err.split())
    assert not output.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.txt", "t.partial.npz"]


def wait_for_rows(folder: Path, process: "subprocess.Popen[str]") -> None:
    """Until the recording has written a block."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        if any(path.stat().st_size for path in folder.glob(".t.npz.*/topk")):
            return
        time.sleep(0.05)
    pytest.fail(f"nothing was recorded: {process.communicate()[1]}")
