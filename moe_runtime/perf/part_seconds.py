"""How long each part of a step takes on one machine: the one place where bytes become seconds."""

from dataclasses import dataclass
from typing import Self

from moe_runtime.perf.overheads import (
    CPU_OVERHEADS,
    GPU_OVERHEADS,
    OPERATOR_SECONDS,
    Overheads,
)
from moe_runtime.perf.rates import Rates


@dataclass(frozen=True, slots=True, kw_only=True)
class PartSeconds:
    """Of products, reads and copies by the machine's rates; of software by what it costs beside.

    `rows` are tokens that a product computes together. Assumes that a part has its lane to itself.
    """

    rates: Rates
    overheads: Overheads

    @classmethod
    def on(cls, rates: Rates, overheads: Overheads | None = None) -> Self:
        """With the usual overheads of the CPU, or of a GPU where `rates` have a link to one.

        They are those of a processor with OPERATOR_SECONDS; another one's are in proportion.
        """
        usual = CPU_OVERHEADS if rates.link_bytes_per_second is None else GPU_OVERHEADS
        costs = usual if overheads is None else overheads
        if rates.operator_seconds is not None:
            costs = costs.times(rates.operator_seconds / OPERATOR_SECONDS)
        return cls(rates=rates, overheads=costs)

    def dense(self, weight_bytes: float, rows: float, *, uses_kernel: bool) -> float:
        """Of linear layers, torch's or those of the experts' kernel."""
        products = self.rates.kernel if uses_kernel else self.rates.linear
        return products.seconds(weight_bytes, rows)

    def expert(self, used_bytes: float, rows: float) -> float:
        """Of computing with one expert."""
        return self.rates.kernel.seconds(used_bytes, rows)

    def host_expert(self, used_bytes: float, rows: float) -> float:
        """Of computing on the CPU with one that the GPU lacks."""
        return self.rates.host_products.seconds(used_bytes, rows)

    def appending(self, cached_bytes: float) -> float:
        """Of an attention cache that is read, and that transformers copies to append a token."""
        seconds = cached_bytes / self.rates.memory_bytes_per_second
        return seconds + cached_bytes / self.rates.copy_bytes_per_second

    def attention(self, flops: float) -> float:
        """Of so many operations on what is cached, beyond reading it."""
        return flops * self.overheads.attention_flop_seconds

    def layers(self, num_layers: int, rows: float, *, uses_kernel: bool) -> float:
        """Of starting the operators of so many layers."""
        costs = self.overheads
        a_layer = costs.kernel_layer_seconds if uses_kernel else costs.layer_seconds
        return num_layers * (a_layer + rows * costs.row_seconds)

    def starting_reads(self, num_misses: float) -> float:
        """Of asking for so many experts that are missing."""
        return num_misses * self.overheads.miss_seconds

    def reading(self, num_bytes: float, *, is_cached: bool = False) -> float:
        """Of the disk, endless where there is none; a copy of what the page cache has."""
        rate = self.rates.disk_bytes_per_second
        if is_cached:
            return num_bytes / self.rates.copy_bytes_per_second
        if not num_bytes:
            return 0.0
        return float("inf") if rate is None else num_bytes / rate

    def copying(self, num_bytes: float) -> float:
        """Over the link to the GPU, if experts are computed there."""
        rate = self.rates.link_bytes_per_second
        return 0.0 if rate is None else num_bytes / rate
