"""The rate of the link to a GPU right before and right after the turns compared with it."""

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from moe_runtime.measure.probe.gpu_rate import GpuDevice

_COPY_BYTES = 64 * 2**20  # of the order of an expert, so that starting a copy is paid as often


@dataclass(slots=True)
class LinkRate:
    """Copies of pinned host memory to a GPU, one behind the other, as experts travel."""

    gpu: GpuDevice
    found_gbps: list[float] = field(default_factory=list)
    _source: torch.Tensor = field(init=False)
    _target: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._source = self.gpu.pinned(_COPY_BYTES).zero_()  # pages are there before they are timed
        self._target = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=self.gpu.device)

    def read(self, round_index: int, seconds: float) -> tuple[int, float]:
        """(bytes, seconds) of copying for about `seconds`."""
        self.gpu.synchronize()  # sync: what was started before is not of this measurement
        start, num_bytes = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            self._target.copy_(self._source, non_blocking=True)
            self.gpu.synchronize()  # sync: copies are counted as they end
            num_bytes += _COPY_BYTES
        elapsed = time.perf_counter() - start
        self.found_gbps.append(num_bytes / elapsed / 1e9)
        return num_bytes, elapsed

    def as_list(self) -> list[dict[str, Any]]:
        """What `--json` prints: the median of all."""
        return [{"copy_bytes": _COPY_BYTES, "gbps": float(np.median(self.found_gbps))}]
