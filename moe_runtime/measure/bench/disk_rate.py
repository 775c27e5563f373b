"""The disk's rate right before and right after the turns that are compared with it."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moe_runtime.measure.random_read import RandomReads

Setting = tuple[int, int]  # block bytes, blocks at a time

SETTINGS: tuple[Setting, ...] = ((2**20, 2), (2**20, 8), (5 * 2**20, 2))


@dataclass(slots=True)
class DiskRate:
    """Raw reads of the model's files, in the best of a few settings.

    A shared disk may halve or double its rate within seconds, so a turn is held against reads next
    to it, of the same length together. During the first `num_trial_rounds`, which nobody counts,
    the settings take turns; from there on the one with the best median reads.
    """

    reads: RandomReads
    num_trial_rounds: int
    found: dict[Setting, list[float]] = field(default_factory=dict)  # GB/s

    def read(self, round_index: int, seconds: float) -> tuple[int, float]:
        """(bytes, seconds) of reading for about `seconds`."""
        setting = self._setting(round_index)
        block_bytes, num_threads = setting
        num_bytes, elapsed = self.reads.read_for(
            block_bytes=block_bytes, num_threads=num_threads, seconds=seconds
        )
        self.found.setdefault(setting, []).append(num_bytes / elapsed / 1e9)
        return num_bytes, elapsed

    def as_list(self) -> list[dict[str, Any]]:
        """What `--json` prints: the median of each setting."""
        return [
            {"block_bytes": block, "blocks_at_a_time": depth, "gbps": float(np.median(values))}
            for (block, depth), values in self.found.items()
        ]

    def _setting(self, round_index: int) -> Setting:
        if round_index < self.num_trial_rounds or not self.found:
            return SETTINGS[round_index % len(SETTINGS)]
        return max(self.found, key=lambda setting: float(np.median(self.found[setting])))
