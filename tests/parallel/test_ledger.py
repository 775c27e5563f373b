"""Agreements between ranks, and the one file that speaks to torch.distributed."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from moe_runtime.errors import ParallelError
from moe_runtime.parallel.context import KVShape, SharedContext
from moe_runtime.parallel.expert_parallel import ExpertParallel
from moe_runtime.parallel.ledger import Ledger
from moe_runtime.parallel.plan import ExpertPlan, linear_placement
from moe_runtime.parallel.waiting_ranks import WaitingRanks
from moe_runtime.parallel.world import World, _num_nodes, own_device
from moe_runtime.placement.cocluster import DeviceTables
from tests.parallel.exchanging import disagree, gather_own_name
from tests.parallel.rank_pool import RankPool
from tests.test_floors import PACKAGE, SOURCES, imports_of

COLLECTIVES = Path("parallel/ledger.py")
# Groups begin and end there; collectives are the ledger's alone.
GROUPS = Path("parallel/world.py")
_OF_GROUPS = {
    "is_available", "is_initialized", "init_process_group", "destroy_process_group",
    "get_backend", "group",
}  # fmt: skip


def test_only_the_ledger_calls_collectives() -> None:
    """Law: torch.distributed is imported by two files, of which one makes and ends groups alone."""
    using = {
        path
        for path in SOURCES
        if "distributed" in (PACKAGE / path).read_text()
        for found in imports_of(path)
        if found.module.startswith("torch.distributed")
        or (found.module == "torch" and "distributed" in names_from_torch(path))
    }
    assert using == {COLLECTIVES, GROUPS}
    assert attributes_of_distributed(GROUPS) <= _OF_GROUPS


def names_from_torch(path: Path) -> set[str]:
    tree = ast.parse((PACKAGE / path).read_text())
    return {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "torch"
        for alias in node.names
    }


def attributes_of_distributed(path: Path) -> set[str]:
    tree = ast.parse((PACKAGE / path).read_text())
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "distributed"
    }


def test_texts_of_all_ranks_reach_all_ranks(pool: RankPool) -> None:
    for heard in pool.run(gather_own_name, num_ranks=4):
        assert heard == ["", "rang zwei \N{DOUBLE PRIME}", "a\nb", "x" * 300]


def test_ranks_that_disagree_all_say_so(pool: RankPool) -> None:
    """Law: the same error on every rank, with the fact, its values and their ranks."""
    for said in pool.run(disagree, num_ranks=4):
        assert said.startswith(
            "ParallelError: ranks disagree on the dtype: 'bfloat16' on ranks 0, 2, 3, "
            "'float32' on rank 1; start all of them with the same"
        )


def test_nodes_are_blocks_of_ranks_of_one_machine() -> None:
    assert _num_nodes(("a", "a", "b", "b")) == 2
    assert _num_nodes(("a", "b", "a", "b")) == 1, "not in blocks: no rank is taken for near"
    assert _num_nodes(("a", "a", "b")) == 1
    assert _num_nodes(("a",)) == 1


@pytest.mark.parametrize("dispatch", ["auto", "coherent", "speculative"])
def test_a_world_of_64_is_joined_with_few_collectives(dispatch: str) -> None:
    """Law: joining 64 ranks takes two collectives and a plan none, whatever the model.

    Nor do its tables, for the ids of a large vocabulary, or the context that every rank keeps.
    """
    distributed.init_process_group("fake", rank=5, world_size=64, store=FakeStore())
    try:
        world = World.join()
        assert (world.rank, world.num_ranks, world.is_ours) == (5, 64, False)
        placement = linear_placement(
            model="", num_experts=256, num_layers=58, num_ranks=64, num_nodes=8
        )
        parallel = ExpertParallel(world, ExpertPlan.of(placement, world.rank), dispatch)
        if dispatch == "coherent":
            shape = KVShape(key=(1, 576), value=(1, 0), dtype=torch.bfloat16)
            SharedContext([shape] * 61, world.ledger)
        if dispatch == "speculative":
            groups, pairs = np.zeros((58, 130_000), np.int32), np.zeros((58, 64, 64), np.int32)
            tables = DeviceTables(
                token_group=groups,
                token_confidence=groups.astype(np.float32),
                bigram_group=pairs,
                bigram_confidence=pairs.astype(np.float32),
            )
            waiting = WaitingRanks.of(tables, parallel.plan, torch.device("cpu"))
            assert waiting.rows(torch.tensor([5, 130_000])).tolist() == [5, 130_000]
        assert sum(world.ledger.calls().values()) == 2
        assert parallel.report()["experts_held"] == 58 * 4
        assert [world.ledger.node_of(rank) for rank in (5, 63)] == [0, 7]
        parallel.close()
        assert distributed.is_initialized(), "a group that was there before stays"
    finally:
        distributed.destroy_process_group()


def test_a_mesh_of_two_dimensions_is_refused() -> None:
    distributed.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        mesh = distributed.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "ep"))
        with pytest.raises(ParallelError, match=r'2 dimensions.*such as mesh\["ep"\]'):
            World.join(mesh)
        with pytest.raises(ParallelError, match=r"timeout_seconds .5. has no effect on a process"):
            World.join(mesh["ep"], timeout_seconds=5)
        assert Ledger(mesh["ep"].get_group()).num_ranks == 2
    finally:
        distributed.destroy_process_group()


def test_a_gpu_without_a_number_is_the_one_of_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert own_device(torch.device("cuda")) == torch.device("cuda:3")
    assert own_device(torch.device("cuda:1")) == torch.device("cuda:1")
    assert own_device(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.delenv("LOCAL_RANK")
    assert own_device(torch.device("cuda")) == torch.device("cuda")
