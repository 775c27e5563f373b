"""`moe-runtime probe` prints and writes what it measured, and nothing when it is stopped."""

import json
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest

from moe_runtime.measure.probe import disk_rate, matmul_rate, memory_rate
from moe_runtime.measure.probe import probe as probe_file
from moe_runtime.measure.probe.probe import ProbeSizes
from moe_runtime.perf.hardware import Hardware
from tests.command_line import command, environment, run_here

SMALL = ProbeSizes(
    seconds=0,
    least_rounds=1,
    least_file_bytes=32 * 2**20,
    scratch_bytes=32 * 2**20,
    weight_shape=(256, 256),
)
START_SECONDS = 120.0  # a hang, not a speed
END_SECONDS = 60.0

Capsys = pytest.CaptureFixture[str]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few bytes, read for a moment: what is tested is not the rate."""
    monkeypatch.setattr(memory_rate, "_USUAL_BYTES", 64 * 2**20)
    monkeypatch.setattr(memory_rate, "_BYTES_PER_THREAD", 2**20)
    monkeypatch.setattr(matmul_rate, "_SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr(disk_rate, "_SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr(probe_file, "probe", partial(probe_file.probe, sizes=SMALL))


@pytest.mark.usefixtures("small")
def test_json_is_one_object_with_every_sample(capsys: Capsys, tmp_path: Path) -> None:
    outcome = run_here(capsys, "probe", "--json", "--path", tmp_path)
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert {"source", "measured_on", "software", "cpu", "memory", "matmul", "disk", "gpus",
            "samples", "remarks"} == set(found)  # fmt: skip
    assert found["memory"]["copy_gbps"] > 0
    assert len(found["samples"]["memory read"]) > 10
    assert len(found["samples"]["disk 131072 bytes, 8 at a time"]) == 1


@pytest.mark.usefixtures("small")
def test_the_table_and_the_file_hold_the_same(capsys: Capsys, tmp_path: Path) -> None:
    file = tmp_path / "machine.yaml"
    outcome = run_here(capsys, "probe", "--path", tmp_path, "-o", file)
    assert outcome.code == 0, outcome.err
    hardware = Hardware.load(file)
    assert [path.name for path in tmp_path.iterdir()] == ["machine.yaml"]
    for text in (hardware.cpu.model, f"{hardware.memory.read_gbps:.3g}", "depth 8", "256 rows"):
        assert text in outcome.out
    assert max(len(line) for line in outcome.out.splitlines()[1:-3]) <= 80
    assert "just written" in outcome.err
    assert "wrote " in outcome.err


@pytest.mark.parametrize("name", ["no/such/folder/machine.yaml", "."])
def test_an_output_that_cannot_be_written_is_refused_before_work(
    capsys: Capsys, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*arguments: object, **options: object) -> None:
        raise AssertionError("the probe ran")

    monkeypatch.setattr(probe_file, "probe", work)
    error = run_here(capsys, "probe", "-o", tmp_path / name, "--path", tmp_path).error()
    assert str(tmp_path) in error


def test_a_folder_that_is_missing_is_named(capsys: Capsys, tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    error = run_here(capsys, "probe", "--path", missing).error()
    assert error == f"{missing} is not a folder; name one on the disk to measure: --path DIR"


def test_an_interrupted_probe_leaves_nothing_behind(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command("probe", "--path", tmp_path, "-o", tmp_path / "machine.yaml"),
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell in the background ignores the signal, and so would its child.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        wait_until_it_reads(process.pid)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=END_SECONDS)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, err
    assert out == ""
    assert err.splitlines()[-1] == "interrupted"
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def wait_until_it_reads(pid: int) -> None:
    """Until the process has its file without a name open."""
    folder = Path(f"/proc/{pid}/fd")
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        for link in folder.iterdir():
            try:
                target = str(link.readlink())
            except OSError:
                continue
            if target.endswith("(deleted)"):
                return
        time.sleep(0.05)
    pytest.fail("the probe did not begin to read")
