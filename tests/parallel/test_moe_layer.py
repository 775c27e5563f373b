"""A layer of replaceable parts computes what a dense loop does, whatever its parts."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import DeviceMesh

from moe_runtime.parallel.alltoall import AllToAllDispatcher
from moe_runtime.parallel.dispatcher import Rows
from moe_runtime.parallel.gates import Gate, GShardGate, SigmoidGate, SoftmaxGate, XMoEGate
from moe_runtime.parallel.ledger import Ledger
from moe_runtime.parallel.moe_layer import Hooks, MoELayer
from moe_runtime.parallel.order import EinsumOrder, Order, SortOrder
from moe_runtime.parallel.plan import ExpertPlan
from moe_runtime.placement_map import Placement
from tests.parallel.rank_pool import RankPool

E, D, P = 6, 8, 4
ORDERS: dict[str, Order[Any]] = {"sort": SortOrder(), "einsum": EinsumOrder()}


def gates(top_k: int) -> dict[str, Gate]:
    draw = torch.Generator().manual_seed(5)
    weight = torch.randn((E, D), generator=draw)
    return {
        "softmax": SoftmaxGate(weight_ED=weight, top_k=top_k, normalize=False),
        "softmax, normalised": SoftmaxGate(weight_ED=weight, top_k=top_k, normalize=True),
        "gshard": GShardGate(weight_ED=weight, top_k=top_k),
        "sigmoid": SigmoidGate(weight_ED=weight, top_k=top_k, normalize=False),
        "sigmoid, normalised": SigmoidGate(weight_ED=weight, top_k=top_k, normalize=True),
        "x-moe": XMoEGate(
            projection_PD=torch.randn((P, D), generator=draw),
            embedding_EP=torch.randn((E, P), generator=draw),
            temperature=0.3,
            top_k=top_k,
        ),
    }


def dense_weights(name: str, gate: Any, token: list[float]) -> list[float]:
    """The weight of every expert for one token, by the papers' equations in plain numbers."""

    def product(rows: torch.Tensor, x: list[float]) -> list[float]:
        return [sum(a * b for a, b in zip(row, x, strict=True)) for row in rows.tolist()]

    def softmax(values: list[float]) -> list[float]:
        total = sum(map(math.exp, values))
        return [math.exp(value) / total for value in values]

    if name == "x-moe":
        h, length = product(gate.projection_PD, token), math.hypot
        scores = softmax(
            [
                sum(a * b for a, b in zip(h, v, strict=True)) / (length(*h) * length(*v) * 0.3)
                for v in gate.embedding_EP.tolist()
            ]
        )
    else:
        logits = product(gate.weight_ED, token)
        is_sigmoid = name.startswith("sigmoid")
        scores = [1 / (1 + math.exp(-z)) for z in logits] if is_sigmoid else softmax(logits)
    best = sorted(range(E), key=lambda e: -scores[e])[: gate.top_k]
    total = sum(scores[e] for e in best)
    divisor = total if name in ("gshard", "softmax, normalised", "sigmoid, normalised") else 1
    return [scores[e] / divisor if e in best else 0.0 for e in range(E)]


def expert(e: int, x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x * (e + 1)) + e


def dense(weights: list[list[float]], x: torch.Tensor) -> torch.Tensor:
    """Every expert for every token."""
    return torch.stack(
        [
            sum((w * expert(e, row) for e, w in enumerate(line)), torch.zeros(D))
            for line, row in zip(weights, x, strict=True)
        ]
    )


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn((count, D), generator=torch.Generator().manual_seed(seed))


LOCAL = {e: (lambda x, e=e: expert(e, x)) for e in range(E)}
CASES = list(itertools.product(gates(1), (1, 2, 4), ORDERS))


@pytest.mark.parametrize(("name", "top_k", "order"), CASES)
def test_every_gate_and_order_equals_the_dense_reference(name: str, top_k: int, order: str) -> None:
    gate = gates(top_k)[name]
    x = tokens(9)
    weights = [dense_weights(name, gate, row) for row in x.tolist()]
    output, routing = MoELayer(gate=gate, experts=LOCAL, order=ORDERS[order]).run(x)
    found = torch.zeros((9, E)).scatter_(1, routing.index, routing.weights)
    torch.testing.assert_close(found, torch.tensor(weights), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(output, dense(weights, x), atol=1e-5, rtol=1e-5)


@given(st.integers(0, 12), st.integers(1, 4), st.integers(0, 99))
def test_orders_agree_and_leave_out_what_asks_for_nobody(count: int, top_k: int, seed: int) -> None:
    """Law: pairs whose id is E reach no expert and add nothing."""
    draw = torch.Generator().manual_seed(seed)
    index = torch.rand((count, E + 1), generator=draw).argsort(1)[:, :top_k]
    rows = Rows(tokens(count, seed), index, torch.rand((count, top_k), generator=draw))
    expected = torch.zeros((count, D))
    for t, k in itertools.product(range(count), range(top_k)):
        if index[t, k] < E:
            expected[t] += rows.weights[t, k] * expert(int(index[t, k]), rows.hidden[t])
    for order in ORDERS.values():
        inputs, state = order.arrange(rows, E)
        assert sum(map(len, inputs.values())) == int((index < E).sum())
        found = order.restore({e: expert(e, x) for e, x in inputs.items()}, state)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_hooks_run_in_the_papers_order_and_what_they_return_is_used() -> None:
    """Law: each of the six is called once, where its name says, and may change what passes."""
    seen: list[str] = []

    def note(name: str, change: float) -> Any:
        def hook(value: Any) -> Any:
            seen.append(name)
            if isinstance(value, Rows):
                return Rows(value.hidden + change, value.index, value.weights)
            return value + change

        return hook

    names = (
        "before_moe_start", "before_dispatch", "after_dispatch", "before_combine", "after_combine",
        "before_moe_end",
    )  # fmt: skip
    hooks = Hooks(**{name: note(name, 10.0**-i) for i, name in enumerate(names)})
    gate = SoftmaxGate(weight_ED=torch.ones((1, D)), top_k=1, normalize=False)
    x = tokens(5).reshape(1, 5, D)
    layer = MoELayer(gate=gate, experts={0: lambda x: 2 * x}, hooks=hooks)
    output = layer(x)
    assert tuple(seen) == names
    torch.testing.assert_close(output, 2 * (x + 1.11) + 0.00111, atol=1e-5, rtol=1e-5)


def run_layer(mesh: DeviceMesh, counts: tuple[int, ...], degree: int) -> dict[str, Any]:
    """A layer in chunks on 4 ranks, two of its six experts on two of them each."""
    rank = mesh.get_local_rank()
    ledger = Ledger(mesh.get_group())
    placement = Placement(
        model="",
        num_experts=E,
        num_hidden_layers=1,
        layer_ids=(0,),
        gpus=4,
        nodes=1,
        slots=np.array([[0, 1, 2, 3, 4, 0, 5, 1]]),
    )
    plan = ExpertPlan.of(placement, rank)
    num_hooked = 0

    def after_dispatch(here: Rows) -> Rows:
        nonlocal num_hooked
        num_hooked += 1
        return here

    layer = MoELayer(
        gate=gates(2)["gshard"],
        experts={e: LOCAL[e] for e in np.flatnonzero(plan.held[0]).tolist()},
        dispatcher=AllToAllDispatcher(plan, ledger),
        hooks=Hooks(after_dispatch=after_dispatch),
        degree=degree,
    )
    with torch.inference_mode():
        output = layer(tokens(counts[rank], seed=rank))
    line = ledger.sent()[0]
    return {
        "output": output.reshape(-1, D).tolist(),
        "bytes": line.num_bytes,
        "predicted": line.predicted_bytes,
        "calls": sum(ledger.calls().values()),
        "hooked": num_hooked,
    }


@pytest.mark.parametrize("degree", [1, 3])
def test_ranks_and_chunks_change_no_output(pool: RankPool, degree: int) -> None:
    """Law: on 4 ranks, one without tokens, in chunks and not: one process's, and all is counted."""
    counts = (5, 0, 1, 8)
    done = pool.run(run_layer, counts, degree, num_ranks=4)
    gate = gates(2)["gshard"]
    for rank, (count, one) in enumerate(zip(counts, done, strict=True)):
        x = tokens(count, seed=rank)
        torch.testing.assert_close(
            torch.tensor(one["output"]).view(-1, D),
            dense([dense_weights("gshard", gate, row) for row in x.tolist()], x)
            if count
            else torch.zeros((0, D)),
            atol=1e-5,
            rtol=1e-5,
        )
        assert one["bytes"] == one["predicted"]
        assert one["calls"] == 3 * degree
        assert 0 < one["hooked"] <= degree, "once for each chunk that has rows here"
