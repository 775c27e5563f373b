"""Simulated times follow from bytes by formula and an interconnect file."""

from dataclasses import replace
from datetime import date

import numpy as np
import pytest

from moe_runtime.errors import PlacementError, TraceError
from moe_runtime.measure.bench.rank_traffic import Replay
from moe_runtime.measure.bench.simulated_times import SimulatedTime, even_placement, simulate_times
from moe_runtime.perf.alpha_beta import AlphaBeta
from moe_runtime.perf.interconnect import Interconnect

SLOW_START = AlphaBeta(alpha_seconds=3e-3, beta_seconds=1e-15, r_squared=1.0)
NETWORK = Interconnect(
    measured_on=date(2026, 1, 1),
    ranks=4,
    nodes=1,
    backend="gloo",
    device="cpu",
    dtype="float32",
    weight_shape=(8, 8),
    all_to_all=SLOW_START,
    all_gather=SLOW_START,
    reduce_scatter=SLOW_START,
    product=SLOW_START,
)
TOPK = np.random.default_rng(0).random((600, 2, 16)).argsort(2)[..., :2].astype(np.int16)
REPLAY = Replay(topk=TOPK, num_experts=16, num_ranks=4, model_dim=256)


def times(network: Interconnect = NETWORK, gpus: int = 64) -> dict[str, SimulatedTime]:
    found = simulate_times(network, REPLAY, gpus=[gpus], tokens_per_rank=4)
    return {one.dispatcher: one for one in found}


def test_starts_grow_with_partners() -> None:
    """Law, by hand: 3 exchanges among 64 are 3 x 63 thirds of a start of 3 ms; nodes first 3 x 14.

    Bytes cost next to nothing here.
    """
    found = times()
    assert found["alltoall"].nodes == 8
    assert found["alltoall"].simulated_seconds == pytest.approx(3 * 63e-3, rel=1e-6)
    assert found["hierarchical"].simulated_seconds == pytest.approx(3 * 14e-3, rel=1e-6)
    assert found["allreduce"].simulated_seconds == pytest.approx(2 * 63e-3, rel=1e-6)
    few = times(gpus=8)
    assert few["alltoall"].simulated_seconds == pytest.approx(3 * 7e-3, rel=1e-6)
    assert few["DeepSpeed-MoE, no drop"].simulated_seconds == pytest.approx(4 * 7e-3, rel=1e-6)


def test_peers_are_left_out_where_they_cannot_run() -> None:
    """Law: with more GPUs than experts; they hold whole experts once."""
    assert {"transformers all_to_all", "DeepSpeed-MoE, no drop"} <= times(gpus=16).keys()
    ours = {"alltoall", "alltoall, a row each pair", "allreduce", "hierarchical"}
    assert times(gpus=64).keys() == ours


def test_bytes_cost_where_starting_does_not() -> None:
    """Law: by the busiest GPU alone; ours moves fewest, sending a row each pair more."""
    free = AlphaBeta(alpha_seconds=0.0, beta_seconds=1e-9, r_squared=1.0)
    network = replace(NETWORK, all_to_all=free, all_gather=free, reduce_scatter=free)
    found = times(network, gpus=4)
    for one in found.values():
        assert one.simulated_seconds == pytest.approx(1e-9 * one.busiest_bytes)
    ours = found["alltoall"].busiest_bytes
    assert 0 < ours < found["alltoall, a row each pair"].busiest_bytes
    assert ours < found["DeepSpeed-MoE, no drop"].busiest_bytes


@pytest.mark.parametrize(("gpus", "copies"), [(4, 1), (16, 1), (64, 4)])
def test_every_expert_is_on_equally_many_gpus(gpus: int, copies: int) -> None:
    placement = even_placement(16, 2, gpus)
    assert (placement.hosts().sum(axis=1) == copies).all()


def test_what_cannot_be_simulated_is_refused() -> None:
    with pytest.raises(PlacementError, match="16 experts and 24 GPUs do not divide"):
        simulate_times(NETWORK, REPLAY, gpus=[24], tokens_per_rank=4)
    with pytest.raises(TraceError, match="600 tokens are fewer than 512 GPUs of 4 need"):
        simulate_times(NETWORK, REPLAY, gpus=[512], tokens_per_rank=4)
    alone = replace(NETWORK, ranks=1)
    with pytest.raises(PlacementError, match="measured on 1 rank"):
        simulate_times(alone, REPLAY, gpus=[8], tokens_per_rank=4)
