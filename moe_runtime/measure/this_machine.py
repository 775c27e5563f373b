"""This machine's rates in under a second: rougher than `moe-runtime probe`, and without torch."""

import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil

from moe_runtime import __version__
from moe_runtime.measure.direct_read import open_folder
from moe_runtime.measure.operator_rate import operator_seconds
from moe_runtime.measure.probe.nvml import open_nvml
from moe_runtime.measure.processor import this_processor
from moe_runtime.memory.available import available_memory_bytes
from moe_runtime.perf.hardware import Cpu, Disk, Gpu, Hardware, Memory, ReadRate, Software
from moe_runtime.perf.hardware_presets import load_hardware_preset, preset_of_gpu

_ARRAY_BYTES = 64 * 2**20  # a thread, beyond the caches
_REPEATS = 3
_PAGE_BYTES = 4096
_MOST_BLOCK_BYTES, _DEPTH = 4 * 2**20, 2  # larger ones are read no faster
_DISK_SECONDS = 0.15
_LEAST_BYTES = 32 * 2**20  # of a checkpoint that is read; of the scratch file otherwise


def this_machine(folder: Path, *, read_bytes: int = _MOST_BLOCK_BYTES) -> Hardware:
    """Memory, the disk under `folder`, and GPUs by name. What cannot be measured is left out.

    The disk's rate is that of reads of about `read_bytes`: small ones are slower.

    A GPU that no preset knows has no rates here: `gpus_without_preset` names it.
    """
    processor = this_processor()
    cores = processor.physical_cores
    return Hardware(
        source="measured",
        measured_on=date.today(),
        software=Software(
            operating_system=f"{platform.system()} {platform.release()}",
            python=platform.python_version(),
            torch=version("torch"),
            moe_runtime=__version__,
            others_cores=0.0,
        ),
        cpu=Cpu(
            model=processor.model,
            physical_cores=cores,
            threads=cores,
            isa=processor.flags,
            operator_nanoseconds=round(1e9 * operator_seconds(), 1),
        ),
        memory=_memory(cores),
        disk=_disk(folder, read_bytes),
        gpus=tuple(_known_gpus()),
    )


def gpus_without_preset() -> list[str]:
    """Names of this machine's GPUs whose rates no preset holds."""
    with open_nvml() as nvml:
        names = [] if nvml is None else [gpu.name for gpu in nvml.devices()]
    return [name for name in names if preset_of_gpu(name) is None]


def _known_gpus() -> list[Gpu]:
    with open_nvml() as nvml:
        found = [] if nvml is None else [(gpu.name, gpu.memory_bytes) for gpu in nvml.devices()]
    gpus = []
    for name, memory_bytes in found:
        preset = preset_of_gpu(name)
        if preset is not None:
            gpu = load_hardware_preset(preset).gpus[0]
            gpus.append(replace(gpu, memory_bytes=memory_bytes))
    return gpus


def _memory(num_threads: int) -> Memory:
    sources = [np.ones(_ARRAY_BYTES // 8, np.uint64) for _ in range(num_threads)]
    targets = [np.zeros_like(source) for source in sources]
    with ThreadPoolExecutor(num_threads) as pool:

        def read(index: int) -> None:
            np.add.reduce(sources[index])

        def copy(index: int) -> None:
            np.copyto(targets[index], sources[index])

        read_gbps = _best_gbps(pool, read, num_threads)
        copy_gbps = _best_gbps(pool, copy, num_threads)
    return Memory(
        total_bytes=psutil.virtual_memory().total,
        available_bytes=available_memory_bytes(),
        read_gbps=read_gbps,
        copy_gbps=copy_gbps,
    )


def _best_gbps(pool: ThreadPoolExecutor, work: Callable[[int], None], num_threads: int) -> float:
    """Of some repeats: what disturbs makes a rate lower, never higher."""
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        list(pool.map(work, range(num_threads)))
        seconds.append(time.perf_counter() - start)
    return round(num_threads * _ARRAY_BYTES / min(seconds) / 1e9, 3)


def _disk(folder: Path, read_bytes: int) -> Disk | None:
    block_bytes = min(read_bytes // _PAGE_BYTES * _PAGE_BYTES, _MOST_BLOCK_BYTES)
    block_bytes = max(block_bytes, _PAGE_BYTES)
    try:
        with open_folder(folder, least_bytes=_LEAST_BYTES, scratch_bytes=_LEAST_BYTES) as found:
            gbps = found.reads.rate_gbps(
                block_bytes=block_bytes, num_threads=_DEPTH, seconds=_DISK_SECONDS
            )
            return Disk(
                file_system=found.reads.file_system,
                direct=found.reads.is_direct,
                read_from=found.source,
                reads=(ReadRate(block_bytes=block_bytes, depth=_DEPTH, gbps=round(gbps, 4)),),
            )
    except OSError:
        return None
