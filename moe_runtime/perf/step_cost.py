"""How long the parts of a decode step take on one machine, from its hardware file."""

from dataclasses import dataclass
from typing import Self

from moe_runtime.errors import ConfigError
from moe_runtime.perf.hardware import Gpu, Hardware, Matmul

_DTYPE = "bfloat16"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """Seconds of each part. `copy_seconds` is 0 where experts are used in the memory they are in.

    Assumes that one row is computed per expert, so a product takes as long as its weights take to
    read; ignores attention over the context and the time to start a kernel.
    """

    dense_seconds: float  # of one layer, before its experts
    expert_seconds: float  # of computing with one expert
    read_seconds: float  # of one expert from disk
    copy_seconds: float  # of one expert over the link to the GPU
    outer_seconds: float = 0.0  # of a step, before its first layer and after its last
    piece_seconds: float = 0.0  # of a read ahead of need, that a demand finds under way; 0: none
    # Of their speeds, what compute and a read ahead of need keep while both are at work.
    compute_share: float = 1.0
    read_share: float = 1.0

    @classmethod
    def of(
        cls, hardware: Hardware, *, expert_bytes: int, dense_bytes: int, piece_bytes: int = 0
    ) -> Self:
        """For experts of `expert_bytes` and layers of `dense_bytes` beside; raises ConfigError.

        Reads ahead of need go by pieces of `piece_bytes`.
        """
        if hardware.disk is None:
            raise ConfigError(
                "the hardware file has no disk, and experts are read from one; measure it with "
                "moe-runtime probe --path FOLDER"
            )
        gpu = hardware.gpus[0] if hardware.gpus else None
        weights_gbps = _weights_gbps(hardware, gpu)
        link_gbps = None if gpu is None else gpu.pinned_to_gpu_gbps
        if gpu is not None and link_gbps is None:
            raise ConfigError(
                f"the hardware file has no pinned_to_gpu_gbps of its {gpu.name}; measure it with "
                "moe-runtime probe"
            )
        # Measured with compute on the CPU.
        beside = None if gpu is not None else hardware.disk.beside_compute
        return cls(
            dense_seconds=_seconds(dense_bytes, weights_gbps),
            expert_seconds=_seconds(expert_bytes, weights_gbps),
            read_seconds=_seconds(expert_bytes, hardware.disk.best.gbps),
            piece_seconds=_seconds(min(piece_bytes, expert_bytes), hardware.disk.best.gbps),
            copy_seconds=0.0 if link_gbps is None else _seconds(expert_bytes, link_gbps),
            compute_share=1.0 if beside is None else beside.compute_share,
            read_share=1.0 if beside is None else beside.read_share,
        )


def _weights_gbps(hardware: Hardware, gpu: Gpu | None) -> float:
    """Of products of one row; where not measured, of plain reads of the same memory."""
    matmul: Matmul | None = hardware.matmul if gpu is None else gpu.matmul
    rates = [] if matmul is None else matmul.rates
    found = [rate.weights_gbps for rate in rates if rate.rows == 1 and rate.dtype == _DTYPE]
    if found:
        return max(found)
    if gpu is not None and gpu.memory_read_gbps is not None:
        return gpu.memory_read_gbps
    return hardware.memory.read_gbps


def _seconds(num_bytes: int, gbps: float) -> float:
    return num_bytes / (gbps * 1e9)
