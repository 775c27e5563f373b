"""What a benchmark ran on: processor, memory, kernel, versions, commit."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil
import torch

from moe_runtime import __version__
from moe_runtime.measure.processor import this_processor
from moe_runtime.measure.software_checks import installed_version

_PACKAGES = (
    "torch", "triton", "transformers", "accelerate", "deepspeed", "llama-cpp-python", "gguf",
    "moe-policylang",
)  # fmt: skip


def describe_machine(folder: Path, device: torch.device) -> dict[str, Any]:
    """Facts for the report's head; `folder` is where the weights are. `gpu` is None on the CPU."""
    processor = this_processor()
    return {
        "cpu": processor.model,
        "cpu_flags": list(processor.flags),
        "cores": processor.usable_cores,
        "memory_bytes": psutil.virtual_memory().total,
        "kernel": platform.release(),
        "read_ahead_kib": _read_ahead_kib(folder),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def _read_ahead_kib(folder: Path) -> int | None:
    """How far the kernel reads ahead of a page fault on this disk; None where it does not say."""
    number = folder.stat().st_dev
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    for queue in (device / "queue", device.resolve().parent / "queue"):  # a partition has none
        try:
            return int((queue / "read_ahead_kb").read_text())
        except (OSError, ValueError):
            continue
    return None


def describe_versions() -> dict[str, str]:
    """moe_runtime, Python, and what is installed of the packages that contestants use."""
    found = {name: installed_version(name) for name in _PACKAGES}
    return {
        "moe_runtime": __version__,
        "python": platform.python_version(),
        **{name: version for name, version in found.items() if version is not None},
    }


def git_commit() -> str | None:
    """The commit of this checkout, marked if files differ from it; None outside of one."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    commit = _git(root, "rev-parse", "--short=12", "HEAD")
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    return None if commit is None else commit + (", with changes" if changes else "")


def _git(root: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
