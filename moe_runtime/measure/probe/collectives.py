"""Measures collectives between ranks and products on each, and fits alpha and beta to them."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import partial
from statistics import median

import torch

from moe_runtime.parallel.ledger import CONTROL, Ledger
from moe_runtime.parallel.world import World, own_device
from moe_runtime.perf.alpha_beta import AlphaBeta
from moe_runtime.perf.interconnect import Interconnect

_DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveSizes:
    """Bytes that leave a rank, rows of a product, and how often each is repeated."""

    num_bytes: tuple[int, ...] = tuple(2**power for power in range(12, 25, 2))
    rows: tuple[int, ...] = (1, 4, 16, 64, 256, 1024)
    weight_shape: tuple[int, int] = (1024, 1024)
    repeats: int = 5


_USUAL = CollectiveSizes()


def join_ranks() -> World:
    """All that torchrun has started, each on its GPU, or on the CPU where there is none."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    return World.join(device=own_device(torch.device(kind)))


def probe_collectives(
    world: World,
    *,
    sizes: CollectiveSizes = _USUAL,
    on_progress: Callable[[str], None] = lambda part: None,
) -> Interconnect:
    """What this world's messages cost; collective, and the same on every rank.

    Of each size the median over repeats of the slowest rank's time, the first left out.
    """
    ledger = world.ledger.fresh()
    fits = {}
    messages: dict[str, Callable[[Ledger, int], Callable[[], object]]] = {
        "all_to_all": partial(_all_to_all, partners=range(ledger.num_ranks)),
        "all_gather": _all_gather,
        "reduce_scatter": _reduce_scatter,
    }
    per_node = ledger.num_ranks // ledger.num_nodes
    if 1 < ledger.num_nodes < ledger.num_ranks:
        node, place = divmod(ledger.rank, per_node)
        mates = range(node * per_node, (node + 1) * per_node)
        peers = range(place, ledger.num_ranks, per_node)
        messages["within_node"] = partial(_all_to_all, partners=mates)
        messages["between_nodes"] = partial(_all_to_all, partners=peers)
    for name, run in messages.items():
        on_progress(name)
        samples = [_time(ledger, run(ledger, size), sizes.repeats) for size in sizes.num_bytes]
        fits[name] = AlphaBeta.fit(sizes.num_bytes, samples)
    on_progress("products")
    dtype = _DTYPES.get(ledger.device.type, torch.float32)
    outputs, inputs = sizes.weight_shape
    weight = torch.randn(outputs, inputs, dtype=dtype, device=ledger.device)
    flops = [2.0 * rows * outputs * inputs for rows in sizes.rows]
    seconds = [_time(ledger, _product(weight, rows), sizes.repeats) for rows in sizes.rows]
    return Interconnect(
        measured_on=date.today(),
        ranks=ledger.num_ranks,
        nodes=ledger.num_nodes,
        backend=ledger.backend,
        device=ledger.device.type,
        dtype=str(dtype).removeprefix("torch."),
        weight_shape=sizes.weight_shape,
        product=AlphaBeta.fit(flops, seconds),
        **fits,
    )


def _time(ledger: Ledger, run: Callable[[], object], repeats: int) -> float:
    mine = []
    for _ in range(repeats + 1):
        ledger.barrier()
        begin = time.perf_counter()
        run()
        if ledger.device.type == "cuda":
            torch.cuda.synchronize(ledger.device)  # sync: the end of what is timed
        mine.append(time.perf_counter() - begin)
    told = torch.tensor(mine[1:], dtype=torch.float64, device=ledger.device)
    slowest = ledger.all_gather(CONTROL, told).amax(0)
    return float(median(slowest.tolist()))


def _all_to_all(ledger: Ledger, num_bytes: int, *, partners: range) -> Callable[[], object]:
    part = num_bytes // max(len(partners) - 1, 1)
    parts = [part * (g in partners and g != ledger.rank) for g in range(ledger.num_ranks)]
    rows = torch.zeros(sum(parts), dtype=torch.uint8, device=ledger.device)
    return lambda: ledger.all_to_all(CONTROL, rows, parts, parts)


def _all_gather(ledger: Ledger, num_bytes: int) -> Callable[[], object]:
    others = max(ledger.num_ranks - 1, 1)
    part = torch.zeros(num_bytes // others, dtype=torch.uint8, device=ledger.device)
    return lambda: ledger.all_gather(CONTROL, part)


def _reduce_scatter(ledger: Ledger, num_bytes: int) -> Callable[[], object]:
    others = max(ledger.num_ranks - 1, 1)
    numbers = num_bytes // others // torch.float32.itemsize
    parts = torch.zeros(ledger.num_ranks, numbers, device=ledger.device)
    return lambda: ledger.reduce_scatter(CONTROL, parts)


def _product(weight: torch.Tensor, rows: int) -> Callable[[], object]:
    x = torch.ones(rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
    return lambda: torch.nn.functional.linear(x, weight)
