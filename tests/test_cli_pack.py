"""`moe-runtime pack` and `unpack`: a packed model works wherever a model does."""

import json
from pathlib import Path

import pytest

from moe_runtime.cli.demo import CHECKPOINT
from tests.command_line import run_here

Capsys = pytest.CaptureFixture[str]


@pytest.fixture
def packed(capsys: Capsys, tmp_path: Path) -> Path:
    outcome = run_here(capsys, "pack", CHECKPOINT, "-o", tmp_path / "packed")
    assert outcome.code == 0, outcome.err
    assert "packed" in outcome.out
    return tmp_path / "packed"


def test_the_demo_takes_three_quarters(capsys: Capsys, tmp_path: Path) -> None:
    """Law: at most 0.77 of the bytes of its experts; one JSON object says so."""
    outcome = run_here(capsys, "pack", CHECKPOINT, "-o", tmp_path / "packed", "--json")
    found = json.loads(outcome.out)
    assert found["expert_share"] <= 0.77
    assert found["packed_tensors"] == 6 * 8 * 3
    assert found["tensors_left_as_they_are"] == 0
    assert found["packed_bytes"] < found["source_bytes"]


def test_unpack_restores_every_byte(capsys: Capsys, packed: Path, tmp_path: Path) -> None:
    outcome = run_here(capsys, "unpack", packed, "-o", tmp_path / "back", "--json")
    assert json.loads(outcome.out)["folder"] == str(tmp_path / "back")
    for file in CHECKPOINT.iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()
    assert not (tmp_path / "back" / "packing.json").exists()


@pytest.mark.parametrize("slots", ["auto", "packed", "unpacked"])
def test_generate_checks_against_the_unpacked_model(
    slots: str, capsys: Capsys, packed: Path
) -> None:
    """Law: --check restores the source beside, and every logit is its own."""
    outcome = run_here(
        capsys, "generate", packed, "--prompt", "def read(", "--max-new-tokens", "4",
        "--expert-memory", "40%", "--expert-slots", slots, "--exact", "--check", "--json",
    )  # fmt: skip
    found = json.loads(outcome.out)
    assert found["parity"]["identical"], outcome.err
    assert found["settings"]["packed_on_disk"]
    assert found["settings"]["expert_slots"] == ("packed" if slots == "packed" else "unpacked")
    assert found["settings"]["unpack"]


def test_inspect_shows_the_packed_bytes(capsys: Capsys, packed: Path) -> None:
    assert "packed experts" in run_here(capsys, "inspect", packed).out
    found = json.loads(run_here(capsys, "inspect", packed, "--json").out)
    assert found["packed_expert_bytes"] < 0.77 * found["expert_total_bytes"]


def test_errors_are_one_sentence(capsys: Capsys, packed: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for words, complaint in [
        (("pack", CHECKPOINT, "-o", tmp_path / "file"), "is a file; name a folder"),
        (("pack", CHECKPOINT, "-o", tmp_path / "no" / "where"), "there is no folder"),
        (("pack", packed, "-o", tmp_path / "twice"), "is packed already"),
        (("unpack", CHECKPOINT, "-o", tmp_path / "back"), "holds no packing.json"),
        (("unpack", packed, "-o", packed), "holds files"),
    ]:
        assert complaint in run_here(capsys, *words).error()
    file = packed / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "truncated" in run_here(capsys, "inspect", packed).error()
