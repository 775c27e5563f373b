"""Where no kernel can run, the error names what is missing and what to do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_runtime.kernels import launch
from moe_runtime.kernels.launch import UnsupportedKernelError, check_device

ROOT = Path(__file__).resolve().parents[2]


def test_without_a_gpu_and_without_the_interpreter_the_error_names_the_remedy() -> None:
    program = (
        "import torch; from moe_runtime.kernels.topk import route\n"
        "try: route(torch.zeros(2, 4), top_k=2, scoring='softmax')\n"
        "except ValueError as error: print(error)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    finished = subprocess.run(
        [sys.executable, "-P", "-c", program],
        env={**environment, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )
    assert finished.stdout == (
        "logits_TE is on cpu, and Triton kernels run on CUDA devices: move it to one, or set "
        "TRITON_INTERPRET=1 before Python starts to run them slowly on the CPU\n"
    ), finished.stderr


def test_tensors_on_two_devices_are_refused() -> None:
    with pytest.raises(UnsupportedKernelError, match="y is on meta and x on cpu: move both"):
        check_device(None, x=torch.zeros(1), y=torch.zeros(1, device="meta"), z=None)


@pytest.mark.parametrize(
    ("capability", "needs_fp8", "complaint"),
    [
        ((7, 5), False, r"Old GPU has compute capability 7\.5, and the kernels need 8\.0"),
        ((8, 6), True, r"Old GPU has compute capability 8\.6, and fp8 weights need 8\.9"),
        ((8, 0), False, None),
        ((8, 9), True, None),
    ],
)
def test_a_gpu_that_is_too_old_is_refused(
    capability: tuple[int, int],
    needs_fp8: bool,
    complaint: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class OnGpu:
        device = torch.device("cuda:0")
        is_cuda = True

    monkeypatch.setattr(launch, "is_interpreted", lambda kernel: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    if complaint is None:
        check_device(None, needs_fp8=needs_fp8, x=OnGpu())  # type: ignore[arg-type]
        return
    with pytest.raises(UnsupportedKernelError, match=complaint):
        check_device(None, needs_fp8=needs_fp8, x=OnGpu())  # type: ignore[arg-type]
