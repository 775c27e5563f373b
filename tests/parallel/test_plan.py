"""Which rank computes what: laws of the plan, without any process group."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.errors import PlacementError
from moe_runtime.parallel.plan import ExpertPlan, check_placement, linear_placement
from moe_runtime.placement_map import Placement
from tests.placements import REPLICATED_ROWS, small_placement


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    """Any number of nodes, GPUs, experts and replicas."""
    nodes = draw(st.integers(1, 3))
    gpus = nodes * draw(st.integers(1, 3))
    per_gpu = draw(st.integers(1, 4))
    num_experts = draw(st.integers(1, gpus * per_gpu))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    extra = rng.integers(0, num_experts, (2, gpus * per_gpu - num_experts))
    every = np.tile(np.arange(num_experts), (2, 1))
    slots = rng.permuted(np.hstack([every, extra]), axis=1)
    return Placement(
        model="any",
        num_experts=num_experts,
        num_hidden_layers=2,
        layer_ids=(0, 1),
        gpus=gpus,
        nodes=nodes,
        slots=slots,
    )


@given(placement=placements())
def test_the_nearest_holder_computes(placement: Placement) -> None:
    """Law: the owner holds the expert; it is the rank itself, else of its node, if any of these."""
    hosts = placement.hosts()
    per_node = placement.gpus // placement.nodes
    index_TK = torch.arange(placement.num_experts).repeat(7, 1)
    for rank in range(placement.gpus):
        plan = ExpertPlan.of(placement, rank)
        node = rank // per_node
        for layer in range(placement.num_layers):
            owners = plan.nearest.owners(layer, index_TK, first_turn=rank).numpy()
            for expert in range(placement.num_experts):
                holders = set(np.flatnonzero(hosts[layer, :, expert]))
                neighbours = {g for g in holders if g // per_node == node}
                nearest = {rank} if rank in holders else neighbours or holders
                assert set(owners[:, expert]) <= nearest
                turns = min(len(nearest), 7)
                assert len(set(owners[:, expert])) == turns, "tokens take turns among equals"


@given(placement=placements())
def test_tokens_that_all_ranks_know_have_one_owner(placement: Placement) -> None:
    """Law: `any_holder` is the same on every rank, holds the expert, and shares the load evenly."""
    index_TK = torch.arange(placement.num_experts).repeat(12, 1)
    choices = [
        ExpertPlan.of(placement, rank).any_holder.owners(1, index_TK, 0)
        for rank in range(placement.gpus)
    ]
    assert all(torch.equal(choices[0], other) for other in choices)
    hosts = placement.hosts()[1]
    for expert in range(placement.num_experts):
        loads = np.bincount(choices[0][:, expert].numpy(), minlength=placement.gpus)
        assert not loads[~hosts[:, expert]].any()
        assert np.ptp(loads[hosts[:, expert]]) <= 1


def test_an_id_that_asks_for_nothing_belongs_to_nobody() -> None:
    plan = ExpertPlan.of(small_placement(REPLICATED_ROWS), 0)
    nobody = torch.full((3, 2), 4)
    assert plan.nearest.owners(0, nobody, 0).tolist() == [[2, 2]] * 3
    assert plan.any_holder.owners(1, nobody, 5).tolist() == [[2, 2]] * 3


def test_a_world_of_64_is_planned_with_tables_of_the_size_of_the_placement() -> None:
    """Law: a rank's plan is L x (E + 1) entries for each choice, whatever the number of ranks."""
    placement = linear_placement(model="", num_experts=256, num_layers=58, num_ranks=64)
    for rank in (0, 63):
        plan = ExpertPlan.of(placement, rank)
        assert plan.num_held == 58 * 4
        for choice in (plan.nearest, plan.any_holder):
            assert choice.ranks.numel() == choice.counts.numel() == 58 * 257


def test_experts_that_do_not_divide_are_refused_with_the_remedy() -> None:
    with pytest.raises(PlacementError, match="10 experts a layer do not divide among 4 ranks"):
        linear_placement(model="", num_experts=10, num_layers=1, num_ranks=4)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"num_ranks": 3}, "for 2 GPUs and there are 3 ranks; start 2 ranks, or solve again"),
        ({"num_experts": 8}, "made for tiny, has 2 MoE layers of 4 experts, and this model 2 of 8"),
        ({"num_layers": 5}, "this model 5 of 4; solve one from a trace of this model"),
        ({"checkpoint": "ffff"}, "was made for tiny, checkpoint 0123, and this is checkpoint ffff"),
    ],
)
def test_a_placement_for_something_else_is_refused(shape: dict[str, Any], words: str) -> None:
    right: dict[str, Any] = {"num_ranks": 2, "num_experts": 4, "num_layers": 2}
    placement = small_placement(checkpoint="0123")
    for checkpoint in ("0123", ""):
        check_placement(placement, **right, checkpoint=checkpoint)
        check_placement(small_placement(), **right, checkpoint=checkpoint)
    with pytest.raises(PlacementError, match=words):
        check_placement(placement, **right | {"checkpoint": ""} | shape)
