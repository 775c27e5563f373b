"""Measures decode attention over pages beside plain reads of the memory, taking turns.

python scripts/bench_attention.py
"""

import platform
import statistics
import time
from collections.abc import Callable

import torch

from moe_runtime.kernels.cpu.attention import PagedAttention
from moe_runtime.kernels.cpu.attention_status import PAGE_TOKENS
from moe_runtime.measure.bench.machine import git_commit
from moe_runtime.measure.processor import this_processor
from moe_runtime.offline.kv_pages import LayerPages, LayerShape

# Query heads, key-value heads, width, dtype, and whose they are.
SHAPES = (
    (16, 16, 128, torch.bfloat16, "OLMoE"),
    (32, 8, 128, torch.bfloat16, "Mixtral"),
    (32, 4, 128, torch.bfloat16, "Qwen3-30B"),
    (64, 8, 64, torch.bfloat16, "gpt-oss"),
    (32, 8, 128, torch.float32, "Mixtral, float32"),
)
LENGTH = 512  # tokens of each sequence
STORE_BYTES = 400 * 2**20  # far above any cache
ROUNDS = 7


def main() -> None:
    """Print one row a shape."""
    print(
        f"{this_processor().model}, {torch.get_num_threads()} threads; Python "
        f"{platform.python_version()}, torch {torch.__version__}; {PagedAttention.status()}; "
        f"commit {git_commit()}\n"
    )
    print("| shapes | heads | dtype | GB/s | of reads | lowest, highest share |")
    print("|---|---|---|---|---|---|")
    everything = torch.ones(64 * 2**20, dtype=torch.int64)
    for num_heads, num_groups, width, dtype, name in SHAPES:
        run, read_bytes = _attention(num_heads, num_groups, width, dtype)
        run()
        rates, shares = [], []
        for _ in range(ROUNDS):
            reads = everything.nbytes / _seconds(lambda: torch.sum(everything))
            rates.append(read_bytes / _seconds(run))
            shares.append(rates[-1] / reads)
        print(
            f"| {name} | {num_heads} on {num_groups} of {width} | {str(dtype)[6:]} | "
            f"{statistics.median(rates) / 1e9:.1f} | {statistics.median(shares):.2f} | "
            f"{min(shares):.2f}, {max(shares):.2f} |",
            flush=True,
        )


def _attention(
    num_heads: int, num_groups: int, width: int, dtype: torch.dtype
) -> tuple[Callable[[], object], int]:
    """A call, and the bytes of keys and values that it reads."""
    page = PAGE_TOKENS * num_groups * width
    pages_each = LENGTH // PAGE_TOKENS
    num_sequences = STORE_BYTES // (2 * page * dtype.itemsize * pages_each)
    num_pages = num_sequences * pages_each
    shape = LayerShape(num_heads=num_groups, key_width=width, value_width=width, dtype=dtype)
    stored = LayerPages.of(shape, num_pages)
    keys, values = stored.key_BGdP.zero_(), stored.value_BGPv.zero_()
    query = torch.randn(num_sequences, num_heads, width).to(dtype)
    table = torch.randperm(num_pages).view(num_sequences, pages_each)
    lengths = torch.full((num_sequences,), LENGTH)
    attention = PagedAttention.load()

    def run() -> torch.Tensor:
        return attention.run(
            query, keys, values, table, lengths,
            scaling=width**-0.5, window=None, sink_H=None, softcap=None,
        )  # fmt: skip

    return run, keys.nbytes + values.nbytes


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
