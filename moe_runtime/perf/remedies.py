"""What could be changed of a machine or a model, for a planner to try."""

from collections.abc import Iterator
from dataclasses import replace

from moe_runtime.perf.hardware import Disk, Gpu, Hardware
from moe_runtime.perf.plan import PlanRequest
from moe_runtime.perf.plan_memory import limit_bytes

_MORE_BYTES = 16 * 2**30


def changes(request: PlanRequest) -> Iterator[tuple[str, PlanRequest]]:
    hardware, spec = request.hardware, request.spec
    gpu = hardware.gpus[0] if hardware.gpus else None
    freed = replace(request, expert_memory_bytes=None)
    where = "host" if gpu is None else "GPU"
    more = limit_bytes(request) + _MORE_BYTES
    yield f"{where} memory +16 GiB", replace(freed, memory_bytes=more)
    if gpu is not None:
        memory = hardware.memory
        larger = replace(memory, available_bytes=memory.available_bytes + _MORE_BYTES)
        limit = request.host_memory_bytes
        limit = None if limit is None else limit + _MORE_BYTES
        yield (
            "host memory +16 GiB",
            replace(request, hardware=replace(hardware, memory=larger), host_memory_bytes=limit),
        )
        if gpu.pinned_to_gpu_gbps is not None:
            faster = _with_link(gpu, 2 * gpu.pinned_to_gpu_gbps)
            yield (
                "a link twice as fast",
                replace(request, hardware=replace(hardware, gpus=(faster, *hardware.gpus[1:]))),
            )
    if hardware.disk is not None:
        yield (
            "a disk twice as fast",
            replace(request, hardware=replace(hardware, disk=scaled_disk(hardware.disk, 2))),
        )
    if gpu is None:
        yield "memory twice as fast", replace(request, hardware=scaled_memory(hardware, 2))
        if spec.expert_format == "bfloat16" and not spec.is_packed:
            yield (
                "packed experts (moe-runtime pack)",
                replace(request, spec=replace(spec, is_packed=True)),
            )
        if spec.expert_format == "bfloat16" and not (request.allows_lossy or request.is_exact):
            yield (
                "experts rounded to int8 or int4, a lossy choice",
                replace(request, allows_lossy=True),
            )


def _with_link(gpu: Gpu, gbps: float) -> Gpu:
    return replace(gpu, pinned_to_gpu_gbps=gbps, pinned_to_gpu_gbps_quartiles=None)


def scaled_disk(disk: Disk, factor: float) -> Disk:
    """One that reads `factor` times as fast."""
    reads = tuple(replace(r, gbps=factor * r.gbps, gbps_quartiles=None) for r in disk.reads)
    return replace(disk, reads=reads)


def scaled_memory(hardware: Hardware, factor: float) -> Hardware:
    """Reads and copies `factor` times as fast, and products of few rows, which wait for them."""
    memory = replace(
        hardware.memory,
        read_gbps=factor * hardware.memory.read_gbps,
        read_gbps_quartiles=None,
        copy_gbps=factor * hardware.memory.copy_gbps,
        copy_gbps_quartiles=None,
    )
    matmul = hardware.matmul
    if matmul is not None:
        most = max((rate.gflops for rate in matmul.rates), default=0.0)
        rates = tuple(
            replace(
                rate,
                weights_gbps=factor * rate.weights_gbps,
                weights_gbps_quartiles=None,
                gflops=factor * rate.gflops,
            )
            if rate.gflops < most / 2
            else rate
            for rate in matmul.rates
        )
        matmul = replace(matmul, rates=rates)
    return replace(hardware, memory=memory, matmul=matmul)
