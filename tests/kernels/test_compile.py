"""Every kernel compiles for the GPUs it is meant for, and fits into their shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from triton import backends

ROOT = Path(__file__).resolve().parents[2]
# CUDA C++ programming guide, table of compute capabilities: the most of one thread block.
SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_all_kernels_compile_and_fit(capability: int) -> None:
    assembler = Path(backends.__file__).parent / "nvidia" / "bin" / "ptxas"
    if not assembler.exists():
        pytest.skip("this build of Triton has no assembler for NVIDIA GPUs")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    finished = subprocess.run(
        [
            sys.executable,
            "-P",
            str(Path(__file__).with_name("compile_kernels.py")),
            str(capability),
        ],
        env={**environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        stdin=subprocess.DEVNULL,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    reports = [json.loads(line) for line in finished.stdout.splitlines()]
    assert {"product_kernel"} <= {report["kernel"] for report in reports}
    too_large = [report for report in reports if report["shared_bytes"] > SHARED_BYTES[capability]]
    assert not too_large
    if capability == 90:  # the large tiles use the matrix instructions of Hopper
        assert any(
            "wgmma" in report["instructions"] and "plain torch.bfloat16" in report["call"]
            for report in reports
        )
