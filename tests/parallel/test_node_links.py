"""Nodes first where links between them are slow: how `auto` decides, and that no token changes."""

from dataclasses import replace
from pathlib import Path

import pytest

from moe_runtime.parallel.node_links import NodeLinks
from moe_runtime.parallel.traffic import RowBytes
from tests.parallel.generating import Batch, generate_on_ranks
from tests.parallel.rank_pool import RankPool
from tests.parallel.test_degree import NETWORK, line
from tests.parallel.test_tokens_are_the_same import (
    FOLDERS,
    NEW_TOKENS,
    batches,
    expected,
    shuffled,
)

__all__ = ["batches", "expected"]  # fixtures

SLOW_BETWEEN = replace(
    NETWORK, nodes=2, within_node=line(1e-6, 1 / 400e9), between_nodes=line(1e-6, 1 / 40e9)
)
ROW = RowBytes(hidden=4096, routed=4120)


def links(**changes: object) -> NodeLinks:
    made = NodeLinks.of(
        replace(SLOW_BETWEEN, **changes),  # type: ignore[arg-type]
        num_nodes=2,
        num_ranks=8,
        num_experts=32,
    )
    assert made is not None
    return made


def test_seconds_by_hand() -> None:
    """Law: top-1 of 1,000 tokens on 2 nodes of 4 ranks visits 3/8 near ranks and 4/8 far ones.

    Nodes first it goes to the other node as often, and from either node to 3 of 4 ranks.
    """
    made, there_and_back = links(), 4096 + 4120
    starts = 3 * (1e-6 + 4 * 1e-6)
    sent = 375 * there_and_back / 400e9 + 500 * there_and_back / 40e9
    assert made.alltoall_seconds(1000, ROW, 1) == pytest.approx(starts + sent)
    sent = 750 * there_and_back / 400e9 + 500 * there_and_back / 40e9
    assert made.hierarchical_seconds(1000, ROW, 1) == pytest.approx(3 * 2e-6 + sent)


def test_nodes_come_first_where_their_links_are_slow_and_rows_shared() -> None:
    """Law: with several experts a token and slow links, not on equal ones; starts favour it."""
    assert links().prefers_nodes_first(4096, ROW, 8)
    assert links().prefers_nodes_first(1, ROW, 1), "fewer starts between nodes"
    even = links(between_nodes=SLOW_BETWEEN.within_node)
    assert not even.prefers_nodes_first(4096, ROW, 8)


@pytest.mark.parametrize(
    ("num_nodes", "network"),
    [(1, SLOW_BETWEEN), (8, SLOW_BETWEEN), (2, NETWORK)],
    ids=["one node", "a rank a node", "not measured"],
)
def test_nothing_is_known_of_links_without_both_kinds(num_nodes: int, network: object) -> None:
    shape = {"num_nodes": num_nodes, "num_ranks": 8, "num_experts": 32}
    assert NodeLinks.of(network, **shape) is None  # type: ignore[arg-type]


def test_auto_takes_nodes_first_and_changes_no_token(
    pool: RankPool,
    batches: dict[str, list[Batch]],
    expected: dict[str, list[list[int]]],
    tmp_path: Path,
) -> None:
    """Law: with two nodes of two ranks by the placement, every byte in the formula."""
    SLOW_BETWEEN.save(tmp_path / "network.yaml")
    mine = batches["mixtral"]
    done = pool.run(
        generate_on_ranks,
        str(FOLDERS["mixtral"]),
        [mine[:2], mine[2:], [], []],
        NEW_TOKENS,
        "auto",
        shuffled("mixtral", 4, nodes=2, replicas=1),
        "50%",
        "exact",
        tmp_path / "network.yaml",
        num_ranks=4,
    )
    assert [tokens for rank in done for tokens in rank["tokens"]] == expected["mixtral"]
    for rank in done:
        parallel = rank["report"]["parallel"]
        assert parallel["chosen"]["hierarchical"] > 0
        assert parallel["moe_bytes"] == parallel["moe_predicted_bytes"] > 0
