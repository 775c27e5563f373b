"""Rates of direct reads at random places, by request size and by how many are under way."""

import random
from collections import defaultdict

from moe_runtime.measure.direct_read import FolderReads
from moe_runtime.measure.file_system import is_in_memory
from moe_runtime.measure.probe.rounding import rounded, rounded_quartiles
from moe_runtime.measure.spread import Spread
from moe_runtime.perf.hardware import BesideCompute, Disk, ReadRate

_KIB, _MIB = 2**10, 2**20
BLOCK_BYTES = (128 * _KIB, _MIB, 1536 * _KIB, 4 * _MIB, 12 * _MIB)
DEPTHS = (1, 2, 8)
_SAMPLE_SECONDS = 0.2


class DiskRates:
    """Samples of one folder's reads in all sizes and depths."""

    def __init__(self, found: FolderReads) -> None:
        self._found = found
        self.reads = found.reads
        self._random = random.Random(0)
        self._gbps: dict[tuple[int, int], list[float]] = defaultdict(list)

    def sample(self) -> None:
        """One sample of every size and depth, in a new order.

        A shared disk grants bursts: what reads first after a pause is served faster.
        """
        settings = [(size, depth) for size in BLOCK_BYTES for depth in DEPTHS]
        self._random.shuffle(settings)
        for size, depth in settings:
            rate = self.reads.rate_gbps(
                block_bytes=size, num_threads=depth, seconds=_SAMPLE_SECONDS
            )
            self._gbps[size, depth].append(rate)

    def result(self, beside_compute: BesideCompute) -> Disk:
        """Medians and quartiles of the samples so far, with what was measured of both at work."""
        reads = []
        for (size, depth), rates in sorted(self._gbps.items()):
            spread = Spread.of(rates)
            reads.append(
                ReadRate(
                    block_bytes=size,
                    depth=depth,
                    gbps=rounded(spread.median),
                    gbps_quartiles=rounded_quartiles(spread),
                )
            )
        return Disk(
            file_system=self.reads.file_system,
            direct=self.reads.is_direct,
            read_from=self._found.source,
            reads=tuple(reads),
            beside_compute=beside_compute,
        )

    def samples(self) -> dict[str, list[float]]:
        """Every sample in its order, GB/s, by a name that says what it is of."""
        return {
            f"disk {size} bytes, {depth} at a time": rates
            for (size, depth), rates in sorted(self._gbps.items())
        }

    def remarks(self) -> list[str]:
        """What a reader of the figures has to know."""
        found = []
        if is_in_memory(self.reads.file_system):
            found.append(
                f"{self.reads.file_system} keeps files in memory and nothing can be dropped from "
                "there: the read rates are those of a copy, not of a disk; name a folder on a disk "
                "with --path"
            )
        elif not self.reads.is_direct:
            found.append(
                f"{self.reads.file_system} refuses O_DIRECT: read through the page cache, dropped "
                "before each read"
            )
        if self._found.is_scratch:
            found.append(
                "a file that was just written may sit in a cache of the disk or of its host; the "
                "rate of a large checkpoint is the honest one: name its folder with --path"
            )
        return found
