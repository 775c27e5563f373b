"""Importing the library is free: nothing heavy, nothing installed, under a fifth of a second."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import moe_runtime

ROOT = Path(__file__).resolve().parents[1]
HEAVY = (
    "deepspeed", "highspy", "matplotlib", "numpy", "pulp", "pynvml", "scipy", "torch",
    "transformers", "triton",
)  # fmt: skip
# The contract of the library, not a target of this machine: it is met with a wide margin.
IMPORT_SECONDS = 0.2


def run_python(*arguments: str, cwd: Path) -> str:
    """Run this interpreter with the checkout on PYTHONPATH; returns what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_library_imports_nothing_heavy(tmp_path: Path) -> None:
    loaded = run_python(
        "-c",
        "import sys, moe_runtime; print(*(m.split('.')[0] for m in sys.modules))",
        cwd=tmp_path,
    )
    assert set(loaded.split()) & set(HEAVY) == set()


def test_importing_the_library_takes_under_a_fifth_of_a_second(tmp_path: Path) -> None:
    """Best of five fresh processes: the slower ones measure what else the machine is doing."""
    timed = (
        "import time; start = time.perf_counter(); import moe_runtime; "
        "print(time.perf_counter() - start)"
    )
    seconds = min(float(run_python("-c", timed, cwd=tmp_path)) for _ in range(5))
    assert seconds < IMPORT_SECONDS


def test_the_library_imports_from_a_plain_checkout_without_site_packages(tmp_path: Path) -> None:
    """-S leaves out all that is installed: only the checkout and the standard library are there."""
    printed = run_python(
        "-S", "-c",
        "import moe_runtime as library; print(library.__file__); print(library.__version__)",
        cwd=tmp_path,
    )  # fmt: skip
    assert printed.splitlines() == [str(ROOT / "moe_runtime/__init__.py"), moe_runtime.__version__]


@pytest.mark.parametrize("name", moe_runtime.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(moe_runtime, name) is not None
    assert name in dir(moe_runtime)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = moe_runtime.no_such_name


def test_the_doctor_reads_versions_without_importing_transformers(tmp_path: Path) -> None:
    """transformers takes seconds to import, and may be what is broken."""
    loaded = run_python(
        "-c",
        "import sys; from pathlib import Path; from moe_runtime.measure.doctor import diagnose; "
        "diagnose(Path('.'), rate_seconds=0.01); print(*sys.modules)",
        cwd=tmp_path,
    )
    assert "transformers" not in loaded.split()
