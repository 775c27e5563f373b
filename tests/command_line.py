"""Runs `moe-runtime` in this process, or in one of its own."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from moe_runtime.cli.app import main

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Outcome:
    """How a command ended and what it wrote."""

    code: int
    out: str
    err: str

    def error(self) -> str:
        """The one sentence of a command that failed as it should."""
        assert self.code != 0, self.out
        assert "Traceback" not in self.err
        assert self.err.count("error: ") == 1, self.err
        before, _, sentence = self.err.rpartition("error: ")
        assert before.strip() == "" or before.count("\n") == 1, f"more than a placement: {before}"
        assert sentence.count("\n") == 1, sentence
        assert "unexpected" not in sentence
        return sentence.strip()


def run_here(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Outcome:
    """Without the seconds that a new process takes to import torch."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    written = capsys.readouterr()
    return Outcome(code, written.out, written.err)


def environment() -> dict[str, str]:
    """For a new process: this checkout, one thread, no GPU, no colours."""
    ours = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    return {**os.environ, **ours, "CUDA_VISIBLE_DEVICES": ""}


def command(*arguments: str | Path) -> list[str]:
    """`python -m moe_runtime` with arguments."""
    return [sys.executable, "-m", "moe_runtime", *(str(argument) for argument in arguments)]


def run_apart(*arguments: str | Path, cwd: Path, stdin: str = "") -> Outcome:
    """As a shell runs it."""
    done = subprocess.run(
        command(*arguments),
        cwd=cwd,
        env=environment(),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)
