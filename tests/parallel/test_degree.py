"""Chunks of a layer: chosen by the fits of an interconnect file, alike on all ranks."""

from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.device_mesh import DeviceMesh

from moe_runtime.errors import ConfigError
from moe_runtime.integrations.transformers.load import load
from moe_runtime.measure.probe.collectives import CollectiveSizes, probe_collectives
from moe_runtime.parallel.degree import MOST_CHUNKS, FittedDegree, FixedDegree
from moe_runtime.parallel.ledger import CONTROL
from moe_runtime.parallel.traffic import RowBytes
from moe_runtime.parallel.world import World
from moe_runtime.perf.alpha_beta import AlphaBeta
from moe_runtime.perf.interconnect import Interconnect
from tests.parallel.generating import Batch, generate_on_ranks
from tests.parallel.rank_pool import RankPool
from tests.parallel.test_tokens_are_the_same import (
    FOLDERS,
    NEW_TOKENS,
    batches,
    expected,
    shuffled,
)

__all__ = ["batches", "expected"]  # fixtures


def line(alpha: float, beta: float) -> AlphaBeta:
    return AlphaBeta(alpha_seconds=alpha, beta_seconds=beta, r_squared=1.0)


NETWORK = Interconnect(
    measured_on=date(2026, 1, 1),
    ranks=4,
    nodes=1,
    backend="nccl",
    device="cuda",
    dtype="bfloat16",
    weight_shape=(1000, 1000),
    all_to_all=line(20e-6, 1 / 25e9),
    all_gather=line(10e-6, 1 / 50e9),
    reduce_scatter=line(10e-6, 1 / 50e9),
    product=line(1e-6, 1 / 100e12),
)
ROW = RowBytes(hidden=4096, routed=4120)


def fitted(dispatch: str) -> FittedDegree:
    return FittedDegree(
        interconnect=NETWORK,
        dispatch=dispatch,
        num_ranks=4,
        num_experts=32,
        expert_weights=3_000_000,
    )


@pytest.mark.parametrize("dispatch", ["alltoall", "allreduce", "auto", "hierarchical"])
def test_decoding_is_not_cut_up_and_long_prompts_are(dispatch: str) -> None:
    """Law: one chunk where starts dominate, more with more tokens, by the rank that has most."""
    degree = fitted(dispatch)
    chosen = [degree.chunks([1, tokens, 0, 2], ROW, 4) for tokens in (1, 16, 4096, 65536)]
    assert chosen[:2] == [1, 1]
    assert 1 < chosen[2] <= chosen[3] <= MOST_CHUNKS


def test_costs_by_hand() -> None:
    """Law: 1,000 tokens on each of 4 ranks, top-1, 8 experts a rank.

    A token visits each other rank with a chance of 1/4, and of the 12 such visits 3 are a rank's:
    1000 x 3/4 rows of 8,216 bytes there and back; 1,000 pairs of 6 MFLOP; 8 experts of 3 units.
    """
    cost = fitted("alltoall").cost(1000, ROW, 1)
    assert cost.transfer.start_seconds == pytest.approx(60e-6)
    assert cost.transfer.work_seconds == pytest.approx(750 * 8216 / 25e9)
    assert cost.experts.start_seconds == pytest.approx(8 * 3 * 1e-6)
    assert cost.experts.work_seconds == pytest.approx(1000 * 6e6 / 100e12)
    assert fitted("hierarchical").cost(1000, ROW, 1).transfer.start_seconds == pytest.approx(120e-6)
    reduced = fitted("allreduce").cost(1000, ROW, 1).transfer
    assert reduced.start_seconds == pytest.approx(20e-6)
    assert reduced.work_seconds == pytest.approx(3000 * 8216 / 50e9)
    assert FixedDegree(3).chunks([1], ROW, 1) == 3


@pytest.mark.parametrize(
    ("dispatch", "num_ranks", "by_file"),
    [("auto", 4, False), ("hierarchical", 4, True), ("allreduce", 2, False)],
)
def test_chunks_change_no_token(
    pool: RankPool,
    batches: dict[str, list[Batch]],
    expected: dict[str, list[list[int]]],
    tmp_path: Path,
    dispatch: str,
    num_ranks: int,
    by_file: bool,
) -> None:
    """Law: in float32, with ranks without tokens; bytes stay those of the formulas."""
    pipeline: Any = 3
    if by_file:  # messages that start at once, so that every forward is cut up
        pipeline = tmp_path / "network.yaml"
        quick = line(1e-12, 1e-6)
        replace(NETWORK, all_to_all=quick, product=quick).save(pipeline)
    nodes = 2 if dispatch == "hierarchical" else 1
    placement = shuffled("mixtral", num_ranks, nodes=nodes)
    mine = batches["mixtral"]
    by_rank = [mine[:2], mine[2:], [], []][:num_ranks]
    done = pool.run(
        generate_on_ranks,
        str(FOLDERS["mixtral"]),
        by_rank,
        NEW_TOKENS,
        dispatch,
        placement,
        "50%",
        "exact",
        pipeline,
        num_ranks=num_ranks,
    )
    assert [tokens for rank in done for tokens in rank["tokens"]] == expected["mixtral"]
    for rank in done:
        parallel = rank["report"]["parallel"]
        assert parallel["moe_bytes"] == parallel["moe_predicted_bytes"] > 0
        assert sum(parallel["forwards_by_chunks"].values()) == parallel["forwards"]
        if not by_file:
            assert parallel["forwards_by_chunks"] == {"3": parallel["forwards"]}
        else:
            assert any(int(chunks) > 1 for chunks in parallel["forwards_by_chunks"])


def probe(mesh: DeviceMesh, num_nodes: int) -> Interconnect:
    """A short measurement; its messages stand in books of their own."""
    world = World.join(mesh)
    world.ledger.num_nodes = num_nodes
    before = world.ledger.sent()[CONTROL]
    sizes = CollectiveSizes(
        num_bytes=(4096, 65536, 262144), rows=(1, 16, 64), weight_shape=(64, 64), repeats=2
    )
    found = probe_collectives(world, sizes=sizes)
    assert world.ledger.sent()[CONTROL] == before
    return found


@pytest.mark.parametrize("num_nodes", [1, 2])
def test_a_probe_is_the_same_on_all_ranks_and_survives_its_file(
    pool: RankPool, tmp_path: Path, num_nodes: int
) -> None:
    """Law: with links within and between nodes apart, where there are both."""
    found = pool.run(probe, num_nodes, num_ranks=4)
    assert (found[0].within_node is not None) is (num_nodes == 2)
    assert (found[0].between_nodes is not None) is (num_nodes == 2)
    assert all(one == found[0] for one in found)
    assert (found[0].ranks, found[0].backend, found[0].dtype) == (4, "gloo", "float32")
    path = tmp_path / "interconnect.yaml"
    found[0].save(path)
    assert Interconnect.load(path) == found[0]


def test_a_damaged_file_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "interconnect.yaml"
    NETWORK.save(path)
    path.write_text(path.read_text().replace("alpha_seconds: 2.0e-05", "alpha_seconds: fast"))
    with pytest.raises(ConfigError, match=r"all_to_all\.alpha_seconds.*probe --collectives"):
        load(FOLDERS["mixtral"], dispatch="auto", pipeline=path)
    with pytest.raises(ValueError, match="pipeline is 0; a layer runs in 1 chunk or more"):
        load(FOLDERS["mixtral"], dispatch="auto", pipeline=0)
