"""This machine's rates are plausible, its GPUs are known by name, and no disk is no failure."""

from pathlib import Path

import pytest

from moe_runtime.measure import this_machine as module
from moe_runtime.measure.this_machine import gpus_without_preset, this_machine
from moe_runtime.perf.hardware import Hardware
from tests.fake_nvml import FakeNvml


def test_what_is_measured_is_a_sound_hardware_file(tmp_path: Path) -> None:
    found = this_machine(tmp_path, read_bytes=200_000)
    assert found.disk is not None
    assert found.disk.reads[0].block_bytes == 48 * 4096  # whole pages of about as much
    assert found.memory.read_gbps > 0
    assert found.cpu.operator_nanoseconds is not None
    assert found.memory.available_bytes <= found.memory.total_bytes
    found.save(tmp_path / "machine.yaml")
    assert Hardware.load(tmp_path / "machine.yaml") == found


def test_a_folder_that_cannot_be_read_leaves_the_disk_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> object:
        raise OSError("no")

    monkeypatch.setattr(module, "open_folder", refuse)
    assert this_machine(tmp_path).disk is None


def test_gpus_have_a_presets_rates_and_their_own_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pynvml", FakeNvml())
    assert gpus_without_preset() == ["H100"]
    assert this_machine(tmp_path).gpus == ()
    monkeypatch.setattr(FakeNvml, "nvmlDeviceGetName", lambda self, handle: "NVIDIA H100 80GB HBM3")
    assert gpus_without_preset() == []
    (gpu,) = this_machine(tmp_path).gpus
    assert gpu.memory_bytes == 80 * 2**30
    assert gpu.pinned_to_gpu_gbps == 63.0
