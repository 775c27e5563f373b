"""Placements change under a running model: fewest moves, every byte counted, no token changed."""

import subprocess
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.errors import PlacementError
from moe_runtime.parallel.migrate import Migration
from moe_runtime.placement_map import Placement
from tests.parallel.generating import Batch, migrate_while_generating
from tests.parallel.rank_pool import RankPool, free_port
from tests.parallel.test_failure import LONG_SECONDS, start
from tests.parallel.test_tokens_are_the_same import (
    FOLDERS,
    NEW_TOKENS,
    SHAPES,
    batches,
    expected,
    shuffled,
)

__all__ = ["batches", "expected"]  # fixtures


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Placement, Placement]:
    """Two placements of one model on as many nodes of two GPUs each, one with replicas maybe."""
    nodes = draw(st.integers(1, 2))
    gpus, num_layers = 2 * nodes, draw(st.integers(1, 3))
    num_experts = gpus * draw(st.integers(1, 2))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))

    def one(extra: int) -> Placement:
        share = rng.permuted(np.tile(np.arange(num_experts), (num_layers, 1)), axis=1)
        share = share.reshape(num_layers, gpus, -1)
        share = np.concatenate([share, np.roll(share[..., :extra], 1, axis=1)], axis=2)
        return Placement(
            model="",
            num_experts=num_experts,
            num_hidden_layers=num_layers,
            layer_ids=tuple(range(num_layers)),
            gpus=gpus,
            nodes=nodes,
            slots=share.reshape(num_layers, -1),
        )

    return one(draw(st.integers(0, 1))), one(draw(st.integers(0, 1)))


@given(pairs())
def test_moves_are_the_fewest_that_the_topology_allows(pair: tuple[Placement, Placement]) -> None:
    """Law: no renaming of GPUs that keeps nodes together lets more experts stay."""
    before, wanted = pair
    migration = Migration.between(before, wanted)
    hosts, new = before.hosts(), wanted.hosts()

    def keeps_nodes(names: tuple[int, ...]) -> bool:
        per_node = wanted.gpus // wanted.nodes
        blocks = np.array(names).reshape(-1, per_node) // per_node
        return bool((blocks == blocks[:, :1]).all())

    fewest = min(
        int((new[:, list(names)] & ~hosts).sum())
        for names in permutations(range(wanted.gpus))
        if keeps_nodes(names)
    )
    assert len(migration.moves) == fewest


@given(pairs())
def test_moves_make_the_new_placement_from_holders(pair: tuple[Placement, Placement]) -> None:
    """Law: sources hold what they send, targets lack it, and afterwards every rank has its own.

    The placement is the wanted one under other names: each GPU's experts of all layers together.
    """
    before, wanted = pair
    migration = Migration.between(before, wanted)
    held = before.hosts().copy()
    for move in migration.moves:
        layer, expert = move.key
        assert before.hosts()[layer, move.source, expert]
        assert not held[layer, move.target, expert]
        held[layer, move.target, expert] = True
    for rank in range(before.gpus):
        for layer, expert in migration.dropped(rank):
            assert held[layer, rank, expert]
            held[layer, rank, expert] = False
    assert (held == migration.after.hosts()).all()

    def shares(placement: Placement) -> list[bytes]:
        return sorted(placement.hosts()[:, gpu].tobytes() for gpu in range(placement.gpus))

    assert shares(migration.after) == shares(wanted)


def test_the_same_share_under_other_names_and_slots_costs_nothing() -> None:
    before = shuffled("mixtral", 4, nodes=2)
    by_gpu = before.by_gpu()[:, [3, 2, 0, 1], ::-1]  # nodes swapped, GPUs too, slots turned round
    wanted = Placement(
        model="",
        num_experts=before.num_experts,
        num_hidden_layers=before.num_hidden_layers,
        layer_ids=before.layer_ids,
        gpus=4,
        nodes=2,
        slots=by_gpu.reshape(before.slots.shape),
    )
    assert not Migration.between(before, wanted).moves


@pytest.mark.parametrize(
    ("name", "num_ranks", "dispatch", "expert_memory"),
    [
        ("mixtral", 4, "auto", "100%"),
        ("deepseek", 2, "alltoall", "50%"),
        ("deepseek", 4, "allreduce", "100%"),
    ],
)
def test_tokens_do_not_change_while_experts_move(
    pool: RankPool,
    batches: dict[str, list[Batch]],
    expected: dict[str, list[list[int]]],
    name: str,
    num_ranks: int,
    dispatch: str,
    expert_memory: str,
) -> None:
    """Law: two migrations amid decoding, to replicas and back; bytes by ledger and formula equal.

    And no rank reads, or keeps, what it does not hold then.
    """
    to = [shuffled(name, num_ranks, replicas=1), linear_of(name, num_ranks)]
    mine = batches[name]
    by_rank = [mine[:2], mine[2:], [], []][:num_ranks]
    done = pool.run(
        migrate_while_generating,
        str(FOLDERS[name]),
        by_rank,
        NEW_TOKENS,
        dispatch,
        to,
        expert_memory,
        num_ranks=num_ranks,
    )
    assert [tokens for rank in done for tokens in rank["tokens"]] == expected[name]
    first = Migration.between(linear_of(name, num_ranks), to[0])
    second = Migration.between(first.after, to[1])
    for rank in done:
        parallel = rank["report"]["parallel"]
        assert not rank["strangers"]
        assert parallel["experts_moved"] == len(first.moves) + len(second.moves) > 0
        assert parallel["moe_bytes"] == parallel["moe_predicted_bytes"] > 0
        assert rank["migration_predicted"] == parallel["migration_bytes"]
        if expert_memory == "100%":
            assert parallel["migration_bytes"] > 0


def linear_of(name: str, num_ranks: int) -> Placement:
    num_layers, num_experts = SHAPES[name]
    return Placement(
        model="",
        num_experts=num_experts,
        num_hidden_layers=num_layers,
        layer_ids=tuple(range(num_layers)),
        gpus=num_ranks,
        nodes=1,
        slots=np.tile(np.arange(num_experts), (num_layers, 1)),
    )


def test_a_placement_that_does_not_fit_is_refused_where_it_is_asked_for(pool: RankPool) -> None:
    """Law: with an error there, and the ranks go on."""
    wrong = shuffled("deepseek", 2)
    done: list[Any] = pool.run(
        migrate_while_generating,
        str(FOLDERS["mixtral"]),
        [[], []],
        1,
        "auto",
        [wrong],
        "100%",
        num_ranks=2,
    )
    assert done[0]["refused"].startswith(PlacementError.__name__)
    assert "6 MoE layers of 32 experts" in done[0]["refused"]


def test_a_rank_that_dies_amid_a_migration_ends_the_others() -> None:
    """Law: with the sentence, the exit code and in the time of any lost rank."""
    port = free_port()
    healthy = start(0, port, "migrate", LONG_SECONDS)
    failing = start(1, port, "migrate-and-die", LONG_SECONDS)
    try:
        _, said = healthy.communicate(timeout=LONG_SECONDS)
        assert healthy.returncode == 3, said
        assert "rank 0 of 2 lost the others in all_to_all between MoE layers" in said
        assert failing.wait(LONG_SECONDS) == 9
    except subprocess.TimeoutExpired:
        pytest.fail("the healthy rank still waits")
    finally:
        for process in (healthy, failing):
            process.kill()
            process.communicate()
