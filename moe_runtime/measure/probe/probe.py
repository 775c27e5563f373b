"""Measures what this machine can do, in rounds that visit everything again and again."""

import platform
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import psutil
import torch

from moe_runtime import __version__
from moe_runtime.errors import ProbeError
from moe_runtime.measure.contention import Contention
from moe_runtime.measure.direct_read import open_folder
from moe_runtime.measure.operator_rate import operator_seconds
from moe_runtime.measure.probe.disk_rate import DiskRates
from moe_runtime.measure.probe.gpu_rate import (
    GpuRates,
    GpuSizes,
    gpu_devices,
    unmeasured_gpu,
)
from moe_runtime.measure.probe.matmul_rate import (
    MatmulRates,
    expert_products,
    gemv_products,
    torch_products,
)
from moe_runtime.measure.probe.memory_rate import CpuMemoryRate, pool_bytes
from moe_runtime.measure.probe.nvml import Nvml, open_nvml
from moe_runtime.measure.probe.other_load import OtherLoad
from moe_runtime.measure.probe.rounding import rounded, rounded_quartiles
from moe_runtime.measure.processor import this_processor
from moe_runtime.measure.spread import Spread
from moe_runtime.memory.available import available_memory_bytes
from moe_runtime.perf.hardware import Cpu, Gpu, Hardware, Memory, Software

_CPU_ROWS = (1, 2, 4, 16, 64, 256)
_EXPERT_ROWS = (1, 2, 4, 8, 16)
_LOUD_CORES = 0.25  # of other programs: then the figures are theirs too
_COPIES_PER_ROUND = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeSizes:
    """How much is read, multiplied and repeated. Rounds end after `seconds`, not before three."""

    seconds: float = 40.0
    least_rounds: int = 3
    least_file_bytes: int = 512 * 2**20
    scratch_bytes: int = 2**30
    weight_shape: tuple[int, int] = (2048, 2048)
    gpu: GpuSizes = field(default_factory=GpuSizes)


_USUAL = ProbeSizes()


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A measured machine, every single sample, and what a reader of the figures has to know."""

    hardware: Hardware
    samples: Mapping[str, list[float]]
    remarks: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        """What `--json` prints: the hardware file's keys, `samples` and `remarks`."""
        return {
            **self.hardware.as_dict(),
            "measured_on": str(self.hardware.measured_on),
            "samples": dict(self.samples),
            "remarks": list(self.remarks),
        }


def probe(
    folder: Path,
    *,
    sizes: ProbeSizes = _USUAL,
    on_progress: Callable[[str], None] = lambda part: None,
) -> Probe:
    """Measure this machine and the file system under `folder`. Raises ProbeError.

    Hosts that are shared change their mind within seconds, so a setting's samples are spread over
    the whole run instead of following each other.
    """
    if not folder.is_dir():
        raise ProbeError(f"{folder} is not a folder; name one on the disk to measure: --path DIR")
    threads = torch.get_num_threads()
    available_bytes = available_memory_bytes()
    with ExitStack() as open_things:
        memory = open_things.enter_context(
            CpuMemoryRate(num_threads=threads, num_bytes=pool_bytes(threads))
        )
        on_progress("preparing the file to read")
        disk = _open_disk(folder, sizes, open_things)
        on_progress("preparing matrices")
        products = torch_products(
            _CPU_ROWS, num_inputs=sizes.weight_shape[1], device=torch.device("cpu")
        )
        matmul = MatmulRates(
            memory,
            [
                *gemv_products(sizes.weight_shape),
                *expert_products(_EXPERT_ROWS, sizes.weight_shape),
                *products,
            ],
            weight_shape=sizes.weight_shape,
        )
        matmul.warm_up()
        nvml = open_things.enter_context(open_nvml())
        gpus = [GpuRates(gpu, sizes.gpu) for gpu in gpu_devices(nvml)]
        for gpu in gpus:
            gpu.warm_up()
        contention = Contention(memory.pool, disk.reads)
        load = OtherLoad()

        def measure_memory() -> None:
            for _ in range(_COPIES_PER_ROUND):
                memory.copy_gbps()

        parts: list[tuple[str, Callable[[], None]]] = [
            ("disk", disk.sample),
            ("memory", measure_memory),
            ("disk and memory together", contention.sample),
            ("matrix products", matmul.sample),
            *((f"GPU {index}", gpu.sample) for index, gpu in enumerate(gpus)),
        ]
        _run_rounds(parts, sizes, on_progress)
        others_cores = load.cores()
        reads, copies = Spread.of(memory.reads_gbps), Spread.of(memory.copies_gbps)
        processor = this_processor()
        hardware = Hardware(
            source="measured",
            measured_on=date.today(),
            software=Software(
                operating_system=f"{platform.system()} {platform.release()}",
                python=platform.python_version(),
                torch=str(torch.__version__),  # a subclass of str, which YAML does not take
                moe_runtime=__version__,
                nvidia_driver=None if nvml is None else nvml.driver,
                others_cores=round(others_cores, 2),
            ),
            cpu=Cpu(
                model=processor.model,
                physical_cores=processor.physical_cores,
                threads=threads,
                isa=processor.flags,
                operator_nanoseconds=rounded(1e9 * operator_seconds()),
            ),
            memory=Memory(
                total_bytes=psutil.virtual_memory().total,
                available_bytes=available_bytes,
                read_gbps=rounded(reads.median),
                read_gbps_quartiles=rounded_quartiles(reads),
                copy_gbps=rounded(copies.median),
                copy_gbps_quartiles=rounded_quartiles(copies),
            ),
            matmul=matmul.result(),
            disk=disk.result(contention.result()),
            gpus=tuple(gpu.result() for gpu in gpus) or _unmeasured(nvml),
        )
        samples = {
            **disk.samples(),
            **contention.samples(),
            "memory read": memory.reads_gbps,
            "memory copy": memory.copies_gbps,
            **matmul.samples(),
            **{name: values for gpu in gpus for name, values in gpu.samples().items()},
        }
    return Probe(
        hardware=hardware,
        samples=samples,
        remarks=(*disk.remarks(), *_load_remarks(others_cores)),
    )


def _open_disk(folder: Path, sizes: ProbeSizes, open_things: ExitStack) -> DiskRates:
    try:
        found = open_things.enter_context(
            open_folder(
                folder, least_bytes=sizes.least_file_bytes, scratch_bytes=sizes.scratch_bytes
            )
        )
    except OSError as error:
        raise ProbeError(
            f"{folder} cannot be measured: {error.strerror or error}; name a folder that can be "
            "written, or one that holds a large checkpoint: --path DIR"
        ) from error
    return DiskRates(found)


def _run_rounds(
    parts: list[tuple[str, Callable[[], None]]],
    sizes: ProbeSizes,
    on_progress: Callable[[str], None],
) -> None:
    """Rounds of all parts until another one would take longer than `sizes.seconds` in all."""
    start = time.perf_counter()
    num_rounds, elapsed = 0, 0.0
    while num_rounds < sizes.least_rounds or elapsed * (1 + 1 / num_rounds) < sizes.seconds:
        for name, sample in parts:
            on_progress(f"measuring: {name} ({elapsed:.0f} s of about {sizes.seconds:.0f} s)")
            sample()
            elapsed = time.perf_counter() - start
        num_rounds += 1


def _unmeasured(nvml: Nvml | None) -> tuple[Gpu, ...]:
    """GPUs that torch cannot use: what the driver says of them."""
    return () if nvml is None else tuple(unmeasured_gpu(facts) for facts in nvml.devices())


def _load_remarks(others_cores: float) -> list[str]:
    if others_cores < _LOUD_CORES:
        return []
    return [
        f"other programs kept {others_cores:.2f} cores busy meanwhile; measure again when the "
        "machine is idle"
    ]
