"""The program itself: its help is free, and the bundled model runs and is checked."""

import json
from pathlib import Path

import pytest

import moe_runtime
from moe_runtime.cli.app import COMMANDS, CommandFamily
from moe_runtime.cli.demo import CHECKPOINT
from tests.command_line import run_apart, run_here
from tests.test_imports import HEAVY, run_python

MAX_DEMO_BYTES = 10_500_000

Capsys = pytest.CaptureFixture[str]


def test_the_demo_matches_the_unmodified_model_in_a_third_of_the_memory(tmp_path: Path) -> None:
    """Law: from any folder, the same float32 tokens, and logits as near to float32's."""
    outcome = run_apart("demo", "--json", cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert len(found["results"]) == 2
    parity = found["parity"]
    assert parity["mode"] == "fast"
    assert parity["greedy_tokens_equal"] is True
    assert parity["tokens_compared"] > 0
    assert parity["positions"] >= 200
    assert parity["rms_ratio"] <= 1.1
    memory = found["memory"]
    assert memory["expert_budget_bytes"] < 0.34 * memory["expert_total_bytes"]
    assert 0 < found["cache"]["hit_rate"] < 1


def test_the_demo_for_people(capsys: Capsys) -> None:
    outcome = run_here(capsys, "demo", "--max-new-tokens", "8")
    assert outcome.code == 0, outcome.err
    assert "class Queue:" in outcome.out
    assert "greedy float32 tokens equal" in outcome.out


def test_the_bundled_model_is_whole_and_small() -> None:
    files = {file.name for file in CHECKPOINT.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= files
    assert (CHECKPOINT / "model.safetensors").stat().st_size < MAX_DEMO_BYTES


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    """Law: help and version are there at once, also where torch is broken."""
    for words in ([], ["--help"], ["--version"], ["generate", "--help"], ["inspect", "--help"]):
        script = (
            "import sys; from moe_runtime.cli.app import main; "
            f"assert main({words!r}) == 0; "
            "print('MODULES', *(m.split('.')[0] for m in sys.modules))"
        )
        loaded = run_python("-c", script, cwd=tmp_path)
        modules = loaded.rpartition("MODULES")[2].split()
        assert set(modules) & set(HEAVY) == set(), words


def test_help_lists_every_command_and_shows_examples(capsys: Capsys) -> None:
    outcome = run_here(capsys, "--help")
    assert outcome.code == 0
    for name, entry in COMMANDS.items():
        assert name in outcome.out
        assert entry.summary in outcome.out
        own = run_here(capsys, name, "--help")
        assert own.code == 0, own.err
        for inner in entry.commands if isinstance(entry, CommandFamily) else ():
            assert inner in own.out
            assert run_here(capsys, name, inner, "--help").code == 0
    assert "moe-runtime generate ./model" in outcome.out


def test_version(capsys: Capsys) -> None:
    outcome = run_here(capsys, "--version")
    assert (outcome.code, outcome.out.strip()) == (0, f"moe-runtime {moe_runtime.__version__}")
