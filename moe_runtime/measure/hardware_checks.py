"""Checks of the machine: processor, memory, disk and GPU."""

import platform
import resource
from pathlib import Path

import psutil

from moe_runtime.expert_memory import format_bytes
from moe_runtime.measure.check import Check, Status
from moe_runtime.measure.direct_read import measure_direct_read
from moe_runtime.measure.probe.nvml import open_nvml
from moe_runtime.measure.processor import this_processor
from moe_runtime.measure.software_checks import installed_version
from moe_runtime.memory.available import available_memory_bytes, cgroup_limit_bytes

# torch and transformers alone stay resident with 340 to 450 MB.
_IMPORTS_BYTES = 512 * 2**20
_COMFORTABLE_BYTES = 2 * 2**30
_SLOW_DISK_GBPS = 0.3


def check_cpu() -> Check:
    """The processor, its vector instructions, and the cores this process may use."""
    processor = this_processor()
    flags, cores = processor.flags, processor.usable_cores
    facts: dict[str, object] = {"model": processor.model, "flags": list(flags), "cores": cores}
    finding = f"{processor.model}, {cores} usable cores, {' '.join(flags) or 'no AVX2'}"
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    if is_x86 and processor.is_listed and "avx2" not in flags:
        return Check(
            name="cpu",
            status=Status.WARN,
            finding=finding,
            remedy="computing on this CPU will be slow; use one with AVX2 or AVX-512",
            facts=facts,
        )
    return Check(name="cpu", status=Status.OK, finding=finding, facts=facts)


def check_memory() -> Check:
    """What is free for a model, the control groups' limits included."""
    total, limit = psutil.virtual_memory().total, cgroup_limit_bytes()
    available = available_memory_bytes()
    facts: dict[str, object] = {
        "total_bytes": total,
        "available_bytes": available,
        "cgroup_limit_bytes": limit,
    }
    limited = "no cgroup limit" if limit is None else f"cgroup limit {format_bytes(limit)}"
    finding = f"{format_bytes(available)} available of {format_bytes(total)}, {limited}"
    remedy = "end other programs" if limit is None else "raise the cgroup's (container's) limit"
    if available < _IMPORTS_BYTES:
        return Check(
            name="memory",
            status=Status.FAIL,
            finding=finding,
            remedy=f"torch and transformers alone take {format_bytes(_IMPORTS_BYTES)}: {remedy}",
            facts=facts,
        )
    if available < _COMFORTABLE_BYTES:
        return Check(
            name="memory",
            status=Status.WARN,
            finding=finding,
            remedy=f"only small models fit: {remedy}",
            facts=facts,
        )
    return Check(name="memory", status=Status.OK, finding=finding, facts=facts)


def check_memlock() -> Check:
    """How much memory this process may lock. Nothing in this version locks any."""
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    facts: dict[str, object] = {
        "soft_bytes": None if soft == resource.RLIM_INFINITY else soft,
        "hard_bytes": None if hard == resource.RLIM_INFINITY else hard,
    }
    limit = "unlimited" if soft == resource.RLIM_INFINITY else format_bytes(soft)
    finding = f"{limit} (nothing in this version locks memory)"
    return Check(name="memlock", status=Status.OK, finding=finding, facts=facts)


def check_disk(folder: Path, *, seconds: float) -> list[Check]:
    """Whether the folder's file system reads past the page cache, and how fast."""
    if not folder.is_dir():
        return [
            Check(
                name="disk",
                status=Status.FAIL,
                finding=f"{folder} is not a folder",
                remedy="name the folder that holds, or will hold, the model: --path DIR",
                facts={"path": str(folder)},
            )
        ]
    try:
        rate = measure_direct_read(folder, seconds=seconds)
    except OSError as error:
        return [
            Check(
                name="disk",
                status=Status.WARN,
                finding=f"not measured: {folder}: {error.strerror or error}",
                remedy="name a folder that can be written, or one that holds a checkpoint: "
                "--path DIR",
                facts={"path": str(folder)},
            )
        ]
    place: dict[str, object] = {"path": str(folder)}
    direct = Check(
        name="direct reads",
        status=Status.OK if rate.is_direct else Status.WARN,
        finding=f"O_DIRECT {'works' if rate.is_direct else 'is refused'} in {folder}",
        remedy=""
        if rate.is_direct
        else "experts are read through the page cache, which the memory budget does not count; "
        "put the model on a local disk (ext4, xfs)",
        facts=place | {"o_direct": rate.is_direct},
    )
    slow = rate.rate_gbps < _SLOW_DISK_GBPS
    speed = Check(
        name="disk rate",
        status=Status.WARN if slow else Status.OK,
        finding=f"{rate.rate_gbps:.2f} GB/s, {rate.source}",
        remedy="every expert that is not in memory is read at this rate; put the model on a "
        "faster disk, or raise --expert-memory"
        if slow
        else "",
        facts=place
        | {
            "rate_gbps": rate.rate_gbps,
            "bytes_read": rate.bytes_read,
            "seconds": rate.seconds,
            "source": rate.source,
        },
    )
    return [direct, speed]


def check_gpu() -> Check:
    """NVIDIA GPUs and their driver, by NVML; to have none is fine."""
    try:
        import pynvml
    except ImportError:
        return Check(
            name="gpu",
            status=Status.WARN,
            finding="not looked for: nvidia-ml-py is not installed",
            remedy="pip install nvidia-ml-py",
        )
    try:
        with open_nvml() as nvml:
            if nvml is None:
                return Check(
                    name="gpu", status=Status.OK, finding="no NVIDIA driver", facts={"gpus": []}
                )
            driver = nvml.driver
            found = [(device.name, device.memory_bytes) for device in nvml.devices()]
    except pynvml.NVMLError as error:
        return Check(
            name="gpu",
            status=Status.WARN,
            finding=f"the NVIDIA driver answers with an error: {error}",
            remedy="see what nvidia-smi says",
        )
    gpus = [{"name": name, "memory_bytes": size} for name, size in found]
    facts: dict[str, object] = {"driver": driver, "gpus": gpus}
    listed = ", ".join(f"{n} ({format_bytes(s)})" for n, s in found)
    finding = f"driver {driver}, {listed or 'no GPU'}"
    build = installed_version("torch") or ""
    if gpus and build.endswith("+cpu"):
        return Check(
            name="gpu",
            status=Status.WARN,
            finding=f"{finding}; torch {build} cannot use it",
            remedy="install the CUDA build of torch",
            facts=facts,
        )
    return Check(name="gpu", status=Status.OK, finding=finding, facts=facts)
