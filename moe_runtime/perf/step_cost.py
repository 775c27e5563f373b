"""How long the parts of a decode step take on one machine, from its hardware file."""

from dataclasses import dataclass
from typing import Self

from moe_runtime.errors import ConfigError
from moe_runtime.perf.hardware import Hardware
from moe_runtime.perf.part_seconds import PartSeconds
from moe_runtime.perf.rates import Rates

_VALUE_BYTES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """Seconds of each part. `copy_seconds` is 0 where experts are used in the memory they are in.

    Assumes one row of 16 bits in each layer and for each expert; ignores attention over the
    context.
    """

    dense_seconds: float  # of one layer, before its experts, starting its operators included
    expert_seconds: float  # of computing with one expert
    read_seconds: float  # of one expert from disk, asking for it included
    copy_seconds: float  # of one expert over the link to the GPU
    outer_seconds: float = 0.0  # of a step, before its first layer and after its last
    piece_seconds: float = 0.0  # of a read ahead of need, that a demand finds under way; 0: none
    # Of their speeds, what compute and a read ahead of need keep while both are at work.
    compute_share: float = 1.0
    read_share: float = 1.0

    @classmethod
    def of(
        cls,
        hardware: Hardware,
        *,
        expert_bytes: int,
        dense_bytes: int,
        piece_bytes: int = 0,
        uses_kernel: bool = False,
    ) -> Self:
        """For experts of `expert_bytes` and layers of `dense_bytes` beside; raises ConfigError.

        Reads ahead of need go by pieces of `piece_bytes`. `uses_kernel`: the experts' kernel
        computes the linear layers too.
        """
        if hardware.disk is None:
            raise ConfigError(
                "the hardware file has no disk, and experts are read from one; measure it with "
                "moe-runtime probe --path FOLDER"
            )
        gpu = hardware.gpus[0] if hardware.gpus else None
        if gpu is not None and gpu.pinned_to_gpu_gbps is None:
            raise ConfigError(
                f"the hardware file has no pinned_to_gpu_gbps of its {gpu.name}; measure it with "
                "moe-runtime probe"
            )
        parts = PartSeconds.on(
            Rates.of(hardware, value_bytes=_VALUE_BYTES, read_bytes=max(expert_bytes, 1))
        )
        dense = parts.dense(dense_bytes, 1, uses_kernel=uses_kernel)
        # Measured with compute on the CPU.
        beside = None if gpu is not None else hardware.disk.beside_compute
        return cls(
            dense_seconds=dense + parts.layers(1, 1, uses_kernel=uses_kernel),
            expert_seconds=parts.expert(expert_bytes, 1),
            read_seconds=parts.reading(expert_bytes) + parts.starting_reads(1),
            copy_seconds=parts.copying(expert_bytes),
            piece_seconds=parts.reading(min(piece_bytes, expert_bytes)),
            compute_share=1.0 if beside is None else beside.compute_share,
            read_share=1.0 if beside is None else beside.read_share,
        )
