"""The doctor says truly what a machine offers, names a remedy, and leaves nothing behind."""

import importlib.metadata
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

from moe_runtime.cli.doctor import doctor
from moe_runtime.kernels.cpu.experts_status import experts_status
from moe_runtime.kernels.cpu.gemv_status import gemv_status
from moe_runtime.measure import direct_read, hardware_checks, random_read, software_checks
from moe_runtime.measure.check import Check, Status
from moe_runtime.measure.doctor import Diagnosis, diagnose
from tests.fake_nvml import FakeNvml

GIB = 2**30


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scratch file of 32 MiB read for a moment: what is tested is not the rate."""
    monkeypatch.setattr(direct_read, "_SCRATCH_BYTES", 32 * 2**20)
    monkeypatch.setattr("moe_runtime.measure.doctor._RATE_SECONDS", 0.05)


def run_doctor(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(doctor)
    result = CliRunner().invoke(app, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout


def by_name(diagnosis: Diagnosis) -> dict[str, Check]:
    return {check.name: check for check in diagnosis.checks}


def test_json_is_one_object_and_covers_the_machine(tmp_path: Path) -> None:
    code, printed = run_doctor("--json", "--path", str(tmp_path))
    report = json.loads(printed)
    checks = {check["name"]: check for check in report["checks"]}
    assert {
        "python", "packages", "cpu", "memory", "memlock", "direct reads", "disk rate", "gpu",
        "kernels", "optional packages",
    } == set(checks)  # fmt: skip
    assert code == (report["status"] == "fail")
    assert checks["packages"]["facts"]["torch"] == importlib.metadata.version("torch")
    assert checks["cpu"]["facts"]["cores"] == len(os.sched_getaffinity(0))
    assert checks["memory"]["facts"]["available_bytes"] > 0
    assert checks["disk rate"]["facts"]["bytes_read"] > 0
    assert checks["kernels"]["facts"]["active"] == experts_status().partition(" ")[0]
    assert checks["kernels"]["facts"]["experts_bf16"] == experts_status()
    assert checks["kernels"]["facts"]["one_token_bf16"] == gemv_status()


def test_every_check_that_is_not_ok_names_a_remedy(tmp_path: Path) -> None:
    for check in diagnose(tmp_path, rate_seconds=0.01).checks:
        assert bool(check.remedy) == (check.status is not Status.OK), check


def test_the_table_names_every_check(tmp_path: Path) -> None:
    code, printed = run_doctor("--path", str(tmp_path))
    assert code in (0, 1)
    for word in ("python", "packages", "memlock", "direct reads", "optional"):
        assert word in printed


def test_nothing_is_left_in_the_folder(tmp_path: Path) -> None:
    diagnose(tmp_path, rate_seconds=0.01)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_where_files_without_a_name_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "O_TMPFILE")
    rate = direct_read.measure_direct_read(tmp_path, seconds=0.01)
    assert rate.bytes_read > 0
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_fails_with_exit_code_1(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    code, printed = run_doctor("--json", "--path", str(missing))
    report = json.loads(printed)
    (check,) = [check for check in report["checks"] if check["name"] == "disk"]
    assert code == 1
    assert report["status"] == check["status"] == "fail"
    assert check["finding"] == f"{missing} is not a folder"
    assert "--path DIR" in check["remedy"]


def test_a_large_checkpoint_is_read_and_not_written(tmp_path: Path) -> None:
    shard = tmp_path / "model.safetensors"
    shard.write_bytes(os.urandom(33 * 2**20))
    before = shard.stat()
    tmp_path.chmod(0o555)
    try:
        rate = direct_read.measure_direct_read(tmp_path, seconds=0.01)
    finally:
        tmp_path.chmod(0o755)
    assert rate.source == "model.safetensors"
    assert shard.stat().st_mtime_ns == before.st_mtime_ns


def test_a_full_disk_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        direct_read.shutil, "disk_usage", lambda folder: SimpleNamespace(free=100 * 2**20)
    )
    (check,) = hardware_checks.check_disk(tmp_path, seconds=0.01)
    assert check.status is Status.WARN
    assert "less than 544 MiB free" in check.finding


def test_a_folder_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal is made up: the tests may run as root, whom no mode stops."""

    def refuse(folder: Path) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(direct_read, "_open_nameless", refuse)
    (check,) = hardware_checks.check_disk(tmp_path, seconds=0.01)
    assert check.status is Status.WARN
    assert "Permission denied" in check.finding


def test_without_direct_reads_the_budget_is_said_to_leak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random_read, "_open_direct", lambda file: None)
    direct, speed = hardware_checks.check_disk(tmp_path, seconds=0.01)
    assert direct.status is Status.WARN
    assert "page cache" in direct.remedy
    assert speed.name == "disk rate"


def test_a_slow_disk_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = direct_read.DirectReadRate(
        source="scratch file", is_direct=True, bytes_read=10**8, seconds=2.0
    )
    monkeypatch.setattr(hardware_checks, "measure_direct_read", lambda folder, seconds: slow)
    _, speed = hardware_checks.check_disk(tmp_path, seconds=2.0)
    assert speed.status is Status.WARN
    assert speed.finding == "0.05 GB/s, scratch file"


@pytest.mark.parametrize(
    ("available", "status"), [(0.25, Status.FAIL), (1, Status.WARN), (8, Status.OK)]
)
def test_memory_is_judged_by_what_is_available(
    available: float, status: Status, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware_checks, "available_memory_bytes", lambda: int(available * GIB))
    monkeypatch.setattr(hardware_checks, "cgroup_limit_bytes", lambda: 10 * GIB)
    check = hardware_checks.check_memory()
    assert check.status is status
    assert "cgroup limit 10.0 GiB" in check.finding
    assert ("raise the cgroup's" in check.remedy) == (status is not Status.OK)


@pytest.mark.parametrize(
    ("found", "finding"),
    [
        ("5.16.3", "transformers 5.16.3 (at least 5.17)"),
        (None, "transformers missing (at least 5.17)"),
    ],
)
def test_a_missing_or_old_package_fails(
    found: str | None, finding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = {"transformers": found}
    monkeypatch.setattr(
        software_checks, "installed_version", lambda name: versions.get(name, "99.0")
    )
    check = software_checks.check_packages()
    assert check.status is Status.FAIL
    assert check.finding == finding
    assert check.remedy == "pip install --upgrade 'transformers>=5.17'"


def test_a_torch_that_does_not_import_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    check = software_checks.check_kernels()
    assert check.status is Status.FAIL
    assert "torch does not import" in check.finding


@pytest.mark.parametrize(
    ("torch_version", "status"), [("2.13.0+cpu", Status.WARN), ("2.13.0", Status.OK)]
)
def test_a_gpu_that_torch_cannot_use_is_a_warning(
    torch_version: str, status: Status, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    monkeypatch.setattr(hardware_checks, "installed_version", lambda name: torch_version)
    check = hardware_checks.check_gpu()
    assert check.status is status
    assert "driver 570.86, H100 (80.0 GiB)" in check.finding


def test_a_machine_without_a_driver_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoDriver(FakeNvml):
        def nvmlInit(self) -> None:  # noqa: N802
            raise self.NVMLError("Driver Not Loaded")

    monkeypatch.setitem(sys.modules, "pynvml", NoDriver())
    check = hardware_checks.check_gpu()
    assert (check.status, check.finding) == (Status.OK, "no NVIDIA driver")
