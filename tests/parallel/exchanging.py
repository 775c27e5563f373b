"""What ranks do in tests of dispatchers: toy experts, and a record of torch's collectives.

T tokens, K top-k, E experts, D model dim.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh

from moe_runtime.measure.bench.rank_traffic import Replay, measure_traffic
from moe_runtime.measure.bench.stepped_rows import Stepped, measure_stepped
from moe_runtime.parallel.allreduce import AllReduceDispatcher
from moe_runtime.parallel.alltoall import AllToAllDispatcher, Visits
from moe_runtime.parallel.auto import AutoDispatcher
from moe_runtime.parallel.dispatcher import Dispatcher, Rows
from moe_runtime.parallel.hierarchical import HierarchicalDispatcher
from moe_runtime.parallel.ledger import CONTROL, Ledger
from moe_runtime.parallel.payload import make_payload
from moe_runtime.parallel.plan import ExpertPlan
from moe_runtime.parallel.world import check_agreement
from moe_runtime.placement.cocluster import DeviceTables
from moe_runtime.placement_map import Placement

KINDS: dict[str, Any] = {
    kind.name: kind
    for kind in (AllToAllDispatcher, AllReduceDispatcher, AutoDispatcher, HierarchicalDispatcher)
}
_OTHERS = (
    "all_reduce", "broadcast", "reduce", "gather", "scatter", "send", "recv", "all_to_all",
    "all_gather", "reduce_scatter", "all_gather_object", "broadcast_object_list",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Case:
    """One forward of toy layers on several ranks."""

    placement: Placement
    tokens: tuple[int, ...]  # by rank
    top_k: int
    dtype: torch.dtype
    seed: int = 0
    model_dim: int = 6

    def rows(self, layer: int, rank: int) -> Rows:
        """Small whole numbers and quarters, whose sums no order of adding rounds."""
        rng = np.random.default_rng((self.seed, layer, rank))
        num_tokens, num_experts = self.tokens[rank], self.placement.num_experts
        hidden = rng.integers(-3, 4, (num_tokens, self.model_dim))
        index = rng.random((num_tokens, num_experts)).argsort(1)[:, : self.top_k]
        weights = rng.integers(1, 4, (num_tokens, self.top_k)) / 4
        return Rows(
            torch.from_numpy(hidden).to(self.dtype),
            torch.from_numpy(index),
            torch.from_numpy(weights).to(self.dtype),
        )


def compute(rows: Rows, held: set[int], num_experts: int) -> torch.Tensor:
    """Expert e multiplies by e + 1; asks for none but `held`."""
    asked = rows.index < num_experts
    assert set(rows.index[asked].tolist()) <= held, "an expert that is not here"
    factor = (torch.where(asked, rows.index + 1, 0) * rows.weights).sum(1, keepdim=True)
    return rows.hidden * factor.to(rows.hidden.dtype)


def exchange(mesh: DeviceMesh, kind: str, case: Case, payload: str | None = None) -> dict[str, Any]:
    """Outputs by layer, the ledger's books, torch's own, and distinct visits by rank."""
    rank = mesh.get_local_rank()
    ledger = Ledger(mesh.get_group(), num_nodes=case.placement.nodes)
    plan = ExpertPlan.of(case.placement, rank)
    rounding = () if payload is None else (make_payload(payload),)
    dispatcher: Dispatcher[Any] = KINDS[kind](plan, ledger, *rounding)
    outputs, visits = [], []
    with recorded(rank, ledger.num_ranks) as record:
        for layer in range(case.placement.num_layers):
            rows = case.rows(layer, rank)
            held = set(np.flatnonzero(plan.held[layer]).tolist())
            here, state = dispatcher.dispatch(layer, rows, list(case.tokens))
            output = compute(here, held, case.placement.num_experts)
            outputs.append(dispatcher.combine(output, state))
            visits.append(Visits.of(plan, layer, rows.index).counts)
    return {
        "outputs": [output.tolist() for output in outputs],
        "sent": ledger.sent(),
        "calls": ledger.calls(),
        "torch_bytes": record["bytes"],
        "torch_messages": record["messages"],
        "torch_calls": record["calls"],
        "visits": visits,
        "chosen": getattr(dispatcher, "chosen", None),
    }


@contextmanager
def recorded(rank: int, num_ranks: int) -> Iterator[dict[str, Any]]:
    """Bytes to other ranks by what torch.distributed is given; other collectives fail."""
    record: dict[str, Any] = {
        "bytes": [0] * num_ranks,
        "messages": [0] * num_ranks,
        "calls": 0,
    }

    def note(num_bytes: list[int]) -> None:
        record["calls"] += 1
        for other in set(range(num_ranks)) - {rank}:
            record["bytes"][other] += num_bytes[other]
            record["messages"][other] += num_bytes[other] > 0

    def all_to_all(output: Any, given: Any, received: Any, sent: Any, **more: Any) -> None:
        row = given.nbytes // len(given) if len(given) else 0
        note([count * row for count in sent])
        originals["all_to_all_single"](output, given, received, sent, **more)

    def all_gather(output: Any, given: Any, **more: Any) -> None:
        note([given.nbytes] * num_ranks)
        originals[gather](output, given, **more)

    def reduce_scatter(output: Any, given: Any, **more: Any) -> None:
        note([output.nbytes] * num_ranks)
        originals[scatter](output, given, **more)

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("a collective that the ledger does not know")

    def post(operations: Any) -> Any:
        sent = [0] * num_ranks
        for operation in operations:
            if operation.op is distributed.isend:
                sent[operation.group_peer] += operation.tensor.nbytes
        note(sent)
        return originals["batch_isend_irecv"](operations)

    is_new = hasattr(distributed, "all_gather_single")
    gather = "all_gather_single" if is_new else "all_gather_into_tensor"
    scatter = "reduce_scatter_single" if is_new else "reduce_scatter_tensor"
    ours = {"all_to_all_single": all_to_all, gather: all_gather, scatter: reduce_scatter}
    ours["batch_isend_irecv"] = post
    replaced = ours | dict.fromkeys(_OTHERS, forbidden)
    originals = {name: getattr(distributed, name) for name in replaced}
    for name, function in replaced.items():
        setattr(distributed, name, function)
    try:
        yield record
    finally:
        for name, function in originals.items():
            setattr(distributed, name, function)


def gather_own_name(mesh: DeviceMesh) -> list[str]:
    """Texts of unlike lengths, one empty, one beyond ASCII."""
    names = ["", "rang zwei \N{DOUBLE PRIME}", "a\nb", "x" * 300]
    return Ledger(mesh.get_group()).gather_texts(names[mesh.get_local_rank()])


def disagree(mesh: DeviceMesh) -> str:
    """The error of a rank whose dtype is another's."""
    dtype = "float32" if mesh.get_local_rank() == 1 else "bfloat16"
    ledger = Ledger(mesh.get_group())
    try:
        check_agreement(ledger, {"version": "1", "dtype": dtype})
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return "agreed"


def count_stepped(
    mesh: DeviceMesh,
    topk: np.ndarray[Any, Any],
    placement: Placement,
    tables: DeviceTables,
    token_id: np.ndarray[Any, Any],
) -> tuple[Any, int, int]:
    """What `bench parallel` finds for decoder layers that are stepped, and bytes by torch."""
    rank, ledger = mesh.get_local_rank(), Ledger(mesh.get_group())
    replay = Replay(
        topk=topk, num_experts=placement.num_experts, num_ranks=mesh.size(), model_dim=16
    )
    books: list[Ledger] = []

    def fresh() -> Ledger:
        books.append(Ledger(mesh.get_group()))
        return books[-1]

    ledger.fresh = fresh  # type: ignore[method-assign]
    with recorded(rank, ledger.num_ranks) as record:
        rows = measure_stepped(
            ledger,
            replay,
            {"given": placement},
            Stepped(kv_dim=10, tables={"given": tables}, token_id=token_id),
            max_tokens=60,
            sent_tokens=12,
            yardsticks={1: 100.0, 3: 100.0},
            on_progress=lambda done, total: None,
        )
    counted = sum(sum(line.num_bytes) for one in (*books, ledger) for line in one.sent().values())
    return rows, counted, sum(record["bytes"])


def count_traffic(mesh: DeviceMesh, topk: np.ndarray[Any, Any], placement: Placement) -> Any:
    """What `bench parallel` finds."""
    ledger = Ledger(mesh.get_group())
    replay = Replay(topk=topk, num_experts=8, num_ranks=mesh.size(), model_dim=16)
    rows = measure_traffic(
        ledger,
        replay,
        {"equal parts": placement},
        tokens_per_rank=[1, 3],
        max_tokens=60,
        sent_tokens=12,
        on_progress=lambda done, total: None,
    )
    assert set(ledger.sent()) == {CONTROL}, "what is measured stands in books of its own"
    return rows
