"""Seconds of a step that no rate explains: Python, norms, routing, tensors, starting reads."""

from dataclasses import asdict, dataclass
from typing import Self

# Of one small operator from Python (measure/operator_rate.py) where the overheads are as below.
OPERATOR_SECONDS = 400e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Overheads:
    """Of a layer, with torch's linear layers and with the kernel's; of each distinct expert that a
    step misses, of each token in each layer, and of each operation on what is cached.
    """

    layer_seconds: float
    kernel_layer_seconds: float
    miss_seconds: float
    row_seconds: float
    attention_flop_seconds: float

    def times(self, factor: float) -> Self:
        """On a processor that takes so many times as long."""
        return type(self)(**{name: factor * cost for name, cost in asdict(self).items()})


# Fitted by scripts/bench_model.py to runs of a small random model, none of the validated ones, on
# two cores.
CPU_OVERHEADS = Overheads(
    layer_seconds=0.855e-3,
    kernel_layer_seconds=0.739e-3,
    miss_seconds=0.106e-3,
    row_seconds=2.58e-6,
    attention_flop_seconds=3.18e-10,
)
# Never timed: a layer's kernels, each launched in some microseconds.
GPU_OVERHEADS = Overheads(
    layer_seconds=0.4e-3,
    kernel_layer_seconds=0.4e-3,
    miss_seconds=0.0,
    row_seconds=0.0,
    attention_flop_seconds=0.0,
)
