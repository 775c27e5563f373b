"""The probe measures every figure that it writes, says what it read, and leaves nothing behind."""

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_runtime.errors import ProbeError
from moe_runtime.kernels.cpu.experts import CpuExperts
from moe_runtime.kernels.cpu.gemv_status import ACTIVE
from moe_runtime.measure import direct_read, random_read
from moe_runtime.measure.file_system import file_system_of, is_in_memory
from moe_runtime.measure.probe import disk_rate, gpu_rate, matmul_rate, memory_rate
from moe_runtime.measure.probe import probe as probe_file
from moe_runtime.measure.probe.gpu_rate import GpuDevice, GpuSizes, gpu_devices
from moe_runtime.measure.probe.matmul_rate import MatmulRates, Product
from moe_runtime.measure.probe.memory_rate import CpuMemoryRate, pool_bytes, sound_noise
from moe_runtime.measure.probe.nvml import open_nvml
from moe_runtime.measure.probe.other_load import OtherLoad
from moe_runtime.measure.probe.probe import Probe, ProbeSizes, probe
from moe_runtime.perf.hardware import Hardware
from tests.fake_nvml import FakeNvml

GIB = 2**30
SHARED_MEMORY = Path("/dev/shm")
SMALL = ProbeSizes(
    seconds=0,
    least_rounds=2,
    least_file_bytes=32 * 2**20,
    scratch_bytes=32 * 2**20,
    weight_shape=(512, 512),
    gpu=GpuSizes(pool_bytes=2**20, link_bytes=2**20, weight_shape=(64, 64)),
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few bytes, read for a moment: what is tested is not the rate."""
    monkeypatch.setattr(memory_rate, "_USUAL_BYTES", 64 * 2**20)
    monkeypatch.setattr(memory_rate, "_BYTES_PER_THREAD", 2**20)
    monkeypatch.setattr(matmul_rate, "_SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr(disk_rate, "_SAMPLE_SECONDS", 0.0)


def test_every_figure_is_measured_in_every_round_and_loads_back(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    found = probe(tmp_path / "scratch", sizes=SMALL)
    hardware = found.hardware
    assert hardware.matmul is not None
    assert hardware.disk is not None
    rates = {(rate.dtype, rate.rows) for rate in hardware.matmul.rates if rate.kernel == "torch"}
    assert rates == {
        (dtype, rows)
        for dtype in ("float32", "bfloat16", "float16")
        for rows in (1, 2, 4, 16, 64, 256)
    }
    for dtype in ("float32", "bfloat16"):
        if (kernel := CpuExperts.load(getattr(torch, dtype))) is not None:
            path = f"{kernel.level} experts"
            found_rows = [rate.rows for rate in hardware.matmul.rates if rate.kernel == path]
            assert found_rows[:5] == [1, 2, 4, 8, 16]
    assert hardware.disk.beside_compute is not None
    reads = {(read.block_bytes, read.depth) for read in hardware.disk.reads}
    assert reads == {(size, depth) for size in disk_rate.BLOCK_BYTES for depth in (1, 2, 8)}
    for name, samples in found.samples.items():
        assert len(samples) >= 2, name
        assert all(sample > 0 for sample in samples), name
    assert hardware.memory.available_bytes <= hardware.memory.total_bytes
    assert hardware.cpu.threads == torch.get_num_threads()
    assert hardware.disk.read_from.startswith("scratch file of 32.0 MiB")
    assert any("just written" in remark for remark in found.remarks)
    hardware.save(tmp_path / "machine.yaml")
    assert Hardware.load(tmp_path / "machine.yaml") == hardware
    assert list((tmp_path / "scratch").iterdir()) == []


def test_the_median_of_the_samples_is_what_is_written(tmp_path: Path) -> None:
    found = probe(tmp_path, sizes=SMALL)
    assert found.hardware.disk is not None
    (read,) = [r for r in found.hardware.disk.reads if (r.block_bytes, r.depth) == (2**20, 2)]
    first, second = found.samples["disk 1048576 bytes, 2 at a time"]
    assert read.gbps == pytest.approx((first + second) / 2, rel=1e-3)


def test_rounds_end_in_time_but_not_before_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(probe_file.time, "perf_counter", lambda: now)
    visited: list[str] = []

    def part(name: str, seconds: float) -> tuple[str, Any]:
        def sample() -> None:
            nonlocal now
            now += seconds
            visited.append(name)

        return name, sample

    parts = [part("disk", 3.0), part("memory", 1.0)]
    probe_file._run_rounds(parts, ProbeSizes(seconds=21.0), lambda text: None)
    assert visited == ["disk", "memory"] * 5
    visited.clear()
    said: list[str] = []
    probe_file._run_rounds(parts, ProbeSizes(seconds=1.0), said.append)
    assert visited == ["disk", "memory"] * 3
    assert said[1] == "measuring: memory (3 s of about 1 s)"


def test_a_large_checkpoint_is_read_and_not_written(tmp_path: Path) -> None:
    for index, size in enumerate((33, 40, 34)):
        (tmp_path / f"model-{index}.safetensors").write_bytes(os.urandom(size * 2**20))
    (tmp_path / "small.safetensors").write_bytes(bytes(2**20))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    found = probe(tmp_path, sizes=SMALL)
    assert found.hardware.disk is not None
    assert found.hardware.disk.read_from == "model-1.safetensors and 2 more"
    assert not any("just written" in remark for remark in found.remarks)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_without_direct_reads_the_page_cache_is_said_to_be_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random_read, "_open_direct", lambda file: None)
    found = probe(tmp_path, sizes=SMALL)
    assert found.hardware.disk is not None
    assert found.hardware.disk.direct is False
    assert any("refuses O_DIRECT" in remark for remark in found.remarks)


@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="there is no /dev/shm")
def test_a_file_system_in_memory_is_said_to_be_no_disk() -> None:
    descriptor = os.open(SHARED_MEMORY, os.O_RDONLY)
    in_memory = is_in_memory(file_system_of(descriptor))
    os.close(descriptor)
    if not in_memory:
        pytest.skip("/dev/shm is not in memory here")
    found = probe(SHARED_MEMORY, sizes=SMALL)
    assert found.hardware.disk is not None
    assert found.hardware.disk.direct is False
    assert found.hardware.disk.file_system == "tmpfs"
    assert any("the read rates are those of a copy" in remark for remark in found.remarks)


def test_folders_that_cannot_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    for path in (tmp_path / "missing", file):
        with pytest.raises(ProbeError, match=r"is not a folder; name one .*--path DIR"):
            probe(path, sizes=SMALL)

    def refuse(folder: Path) -> int:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(direct_read, "_open_nameless", refuse)
        with pytest.raises(ProbeError, match=r"cannot be measured: Permission denied; .*--path"):
            probe(tmp_path, sizes=SMALL)
    monkeypatch.setattr(
        direct_read.shutil, "disk_usage", lambda folder: SimpleNamespace(free=100 * 2**20)
    )
    with pytest.raises(ProbeError, match=r"cannot be measured: less than 544 MiB free; .*--path"):
        probe(tmp_path, sizes=SMALL)


def test_little_memory_shrinks_the_pool_and_too_little_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory_rate, "_USUAL_BYTES", 512 * 2**20)
    monkeypatch.setattr(memory_rate, "_BYTES_PER_THREAD", 64 * 2**20)
    for available, threads, expected in (
        (100 * GIB, 2, 512 * 2**20),
        (100 * GIB, 96, 96 * 64 * 2**20),
        (2 * GIB, 96, 2**28),
    ):
        monkeypatch.setattr(memory_rate, "available_memory_bytes", lambda a=available: a)
        assert pool_bytes(threads) == expected
    monkeypatch.setattr(memory_rate, "available_memory_bytes", lambda: 300 * 2**20)
    with pytest.raises(ProbeError, match=r"300.0 MiB of memory are available .* needs 512.0 MiB"):
        pool_bytes(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_pool_holds_sound_numbers_in_every_dtype(dtype: torch.dtype) -> None:
    sizes = sound_noise(2**20).view(dtype).abs().float()
    assert sizes.min() >= 0.5
    assert sizes.max() < 2


@pytest.mark.parametrize(("at_once", "share"), [(1, 1.0), (3, 1.0), (2, 0.5)])
def test_a_share_is_against_reads_just_before_and_after(
    at_once: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(matmul_rate.time, "perf_counter", lambda: now)

    class Memory:
        pool = sound_noise(2**20)

        def __init__(self) -> None:
            self.reads_gbps: list[float] = []
            self.copies_gbps: list[float] = []

        def read_gbps(self) -> float:
            self.reads_gbps.append(10.0 * (1 + len(self.reads_gbps)))
            return self.reads_gbps[-1]

        def copy_gbps(self) -> float:
            raise AssertionError

    def work(weights: list[torch.Tensor]) -> None:
        nonlocal now
        assert len(weights) == at_once
        now += sum(weight.nbytes for weight in weights) * share / 6e9

    memory = Memory()
    product = Product("bfloat16", "fake", 4, work, at_once, share)
    matmul = MatmulRates(memory, [product], weight_shape=(64, 64))
    matmul.sample()
    (rate,) = matmul.result().rates
    assert memory.reads_gbps == [10.0, 20.0]
    assert rate.weights_gbps == 6.0
    assert rate.gflops == 24.0  # 2 bytes a weight, 2 operations a weight and row, 4 rows
    assert rate.share_of_read == 0.4


def test_weights_come_from_all_over_the_pool() -> None:
    """A matrix that is used again at once would come from a cache."""
    seen: list[int] = []
    with CpuMemoryRate(num_threads=1, num_bytes=4 * 2**20) as memory:
        product = Product("float32", "fake", 1, lambda weights: seen.append(weights[0].data_ptr()))
        matmul = MatmulRates(memory, [product], weight_shape=(512, 512))
        for _ in range(8):
            matmul.sample()
    assert len(set(seen[:4])) == 4
    assert seen[4:8] == seen[:4]


def test_our_kernel_is_measured_where_the_runtime_would_use_it() -> None:
    products = matmul_rate.gemv_products((512, 512))
    assert [product.kernel for product in products] in ([], [ACTIVE])
    for product in products:
        output = product.run([sound_noise(2 * 512 * 512).view(torch.bfloat16).view(512, 512)])
        assert isinstance(output, torch.Tensor)
        assert output.shape == (1, 512)


def test_work_of_others_is_counted_and_our_own_is_not() -> None:
    load = OtherLoad()
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass
    busy = load.cores()
    assert 0 <= busy <= (os.cpu_count() or 1) + 0.5
    assert probe_file._load_remarks(0.0) == []
    assert "1.50 cores busy meanwhile; measure again" in probe_file._load_remarks(1.5)[0]


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())


def stand_in(free_bytes: int = GIB) -> GpuDevice:
    """The CPU in the place of a GPU."""
    with open_nvml() as nvml:
        assert nvml is not None
        facts = nvml.device("12ab")
    return GpuDevice(
        device=torch.device("cpu"),
        name="H100",
        memory_bytes=80 * GIB,
        compute_capability="9.0",
        multiprocessors=132,
        free_bytes=free_bytes,
        facts=facts,
        synchronize=lambda: None,
        pinned=lambda num_bytes: torch.empty(num_bytes, dtype=torch.uint8),
    )


@pytest.mark.usefixtures("nvml")
def test_a_gpu_is_measured_and_its_facts_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe_file, "gpu_devices", lambda nvml: [stand_in()])
    found: Probe = probe(tmp_path, sizes=SMALL)
    (gpu,) = found.hardware.gpus
    assert (gpu.name, gpu.memory_bytes, gpu.compute_capability) == ("H100", 80 * GIB, "9.0")
    assert (gpu.sm_clock_mhz, gpu.memory_clock_mhz, gpu.power_limit_watts) == (1980, 2619, None)
    assert (gpu.pcie_generation, gpu.pcie_width, gpu.multiprocessors) == (5, 16, 132)
    for name in ("memory_read", "memory_copy", "pinned_to_gpu", "gpu_to_pinned",
                 "pageable_to_gpu", "gpu_to_pageable"):  # fmt: skip
        assert getattr(gpu, f"{name}_gbps") > 0
        assert len(getattr(gpu, f"{name}_gbps_quartiles")) == 2
    assert gpu.matmul is not None
    assert {rate.rows for rate in gpu.matmul.rates} == set(gpu_rate._ROWS)
    assert found.hardware.software is not None
    assert found.hardware.software.nvidia_driver == "570.86"
    found.hardware.save(tmp_path / "machine.yaml")
    assert Hardware.load(tmp_path / "machine.yaml") == found.hardware


@pytest.mark.usefixtures("nvml")
def test_a_gpu_that_torch_cannot_use_has_facts_and_no_rates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    (gpu,) = probe(tmp_path, sizes=SMALL).hardware.gpus
    assert (gpu.name, gpu.sm_clock_mhz) == ("H100", 1980)
    assert gpu.pinned_to_gpu_gbps is gpu.memory_copy_gbps is gpu.matmul is None


@pytest.mark.usefixtures("nvml")
def test_a_gpu_that_others_have_filled_is_refused() -> None:
    with pytest.raises(ProbeError, match=r"H100\) has 1.0 MiB free .* CUDA_VISIBLE_DEVICES"):
        gpu_rate.GpuRates(stand_in(free_bytes=2**20), SMALL.gpu)


@pytest.mark.parametrize(("uuid", "is_known"), [("12ab", True), ("MIG-7", False)])
@pytest.mark.usefixtures("nvml")
def test_what_torch_sees_is_matched_with_the_driver_by_identity(
    monkeypatch: pytest.MonkeyPatch, uuid: str, is_known: bool
) -> None:
    properties = SimpleNamespace(
        name="H100", total_memory=80 * GIB, major=9, minor=0, multi_processor_count=132, uuid=uuid
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (79 * GIB, 80 * GIB))
    with open_nvml() as nvml:
        (gpu,) = gpu_devices(nvml)
    assert (gpu.device, gpu.compute_capability) == (torch.device("cuda", 0), "9.0")
    assert (gpu.memory_bytes, gpu.free_bytes) == (80 * GIB, 79 * GIB)
    assert (gpu.facts is not None) == is_known


def test_without_a_driver_there_are_no_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoDriver(FakeNvml):
        def nvmlInit(self) -> None:  # noqa: N802
            raise self.NVMLError("Driver Not Loaded")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for module in (NoDriver(), None):
        monkeypatch.setitem(sys.modules, "pynvml", module)
        with open_nvml() as nvml:
            assert nvml is None
    assert probe(tmp_path, sizes=SMALL).hardware.gpus == ()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_gpu_is_measured(tmp_path: Path) -> None:
    gpu = probe(tmp_path, sizes=SMALL).hardware.gpus[0]
    assert gpu.name == torch.cuda.get_device_name(0)
    assert gpu.pinned_to_gpu_gbps is not None
