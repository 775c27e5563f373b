"""DeepSpeed's MoE layers give the same outputs when ours run in their place."""

import os
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh

import moe_runtime
from moe_runtime.errors import UnsupportedModelError
from moe_runtime.parallel.traffic import RowBytes, deepspeed_bytes
from tests.parallel.deepspeed_layers import HAS_DEEPSPEED, KINDS, D, E, make_layer
from tests.parallel.rank_pool import RankPool, free_port

needs_deepspeed = pytest.mark.skipif(
    not HAS_DEEPSPEED, reason="deepspeed is not installed in this environment"
)
kinds = pytest.mark.parametrize(
    "kind", ["stand-in", pytest.param("deepspeed", marks=needs_deepspeed)]
)
assert set(KINDS) == {"stand-in", "deepspeed"}
_ONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}


@pytest.fixture
def alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A process group of one rank, which DeepSpeed asks for."""
    if kind == "stand-in":
        yield
        return
    for name, value in (_ONE | {"MASTER_PORT": str(free_port())}).items():
        monkeypatch.setenv(name, value)
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    yield
    deepspeed.comm.destroy_process_group()


def tokens(count: int, seed: int) -> torch.Tensor:
    return torch.randn((1, count, D), generator=torch.Generator().manual_seed(seed))


@kinds
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("top_k", "residual"), [(1, False), (2, True), (4, False)])
def test_one_rank_gives_the_same_three_results(kind: str, top_k: int, residual: bool) -> None:
    """Law: output, balance loss and counts; parameters keep their names, the model its place."""
    layer = make_layer(kind, top_k, residual=residual)
    model = nn.Sequential(nn.Identity(), layer)
    x = tokens(13, 1)
    with torch.no_grad():
        expected = layer(x)
        names = list(model.state_dict())
        assert moe_runtime.from_deepspeed(model) is model
        found = model(x)
    assert list(model.state_dict()) == names
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs.to(mine.dtype), atol=1e-5, rtol=1e-5)


@kinds
@pytest.mark.usefixtures("alone")
def test_what_would_change_outputs_is_refused_and_nothing_is_changed(kind: str) -> None:
    good = make_layer(kind, 1)
    inner = good.deepspeed_moe
    for bad, words in (
        (make_layer(kind, 1, drop_tokens=True), "drops tokens over its capacity; build it with dr"),
        (make_layer(kind, 2, sampling=True), "second experts by chance; .*2nd_expert_sampling=Fal"),
    ):
        with pytest.raises(UnsupportedModelError, match=words):
            moe_runtime.from_deepspeed(nn.Sequential(good, bad))
        assert good.deepspeed_moe is inner
    with pytest.raises(UnsupportedModelError, match="Linear has no DeepSpeed MoE layer"):
        moe_runtime.from_deepspeed(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="degree is 0"):
        moe_runtime.from_deepspeed(good, degree=0)
    moe_runtime.from_deepspeed(good)
    with pytest.raises(UnsupportedModelError, match="used_token leaves tokens out"):
        good.deepspeed_moe(tokens(2, 0), torch.ones(2))
    with pytest.raises(UnsupportedModelError, match="no DeepSpeed MoE layer"):
        moe_runtime.from_deepspeed(good)


def run_both(mesh: DeviceMesh, top_k: int, degree: int) -> dict[str, Any]:
    """DeepSpeed's layer on all ranks, then ours in its place; bytes of both."""
    import deepspeed

    if not deepspeed.comm.is_initialized():
        os.environ["DS_ACCELERATOR"] = "cpu"
        deepspeed.init_distributed(dist_backend="gloo")
    rank, size = mesh.get_local_rank(), mesh.size()
    layer = make_layer("deepspeed", top_k, ep_size=size)
    x = tokens(11, rank)
    sent = [0]
    original = distributed.all_to_all_single

    def counting(*args: Any, **named: Any) -> Any:
        given = named["input"] if "input" in named else args[1]
        sent[0] += given.nbytes * (size - 1) // size
        return original(*args, **named)

    distributed.all_to_all_single = counting
    try:
        with torch.no_grad():
            expected = layer(x)
    finally:
        distributed.all_to_all_single = original
    with torch.no_grad():
        moe_runtime.from_deepspeed(layer, degree=degree)
        found = layer(x)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs.to(mine.dtype), atol=1e-5, rtol=1e-5)
    line = layer.deepspeed_moe.ledger.sent()[0]
    return {
        "theirs": sent[0],
        "ours": sum(line.num_bytes),
        "formula": sum(line.predicted_bytes),
        "counts": found[2].tolist(),
    }


@needs_deepspeed
@pytest.mark.parametrize(("top_k", "degree"), [(1, 1), (2, 3), (4, 1)])
def test_ranks_give_the_same_results_for_fewer_bytes(
    pool: RankPool, top_k: int, degree: int
) -> None:
    """Law: on 4 ranks; what DeepSpeed sends is the formula that `bench parallel` prints."""
    done = pool.run(run_both, top_k, degree, num_ranks=4)
    counts = np.array([one["counts"] for one in done])
    size = RowBytes.sized(model_dim=D, item_bytes=4, top_k=top_k, weight_bytes=4)
    padded = deepspeed_bytes(counts, size)
    capacity_bytes = 2 * 8 / 4 * 4 * 3  # of agreeing on the capacity, all ranks together
    assert sum(one["theirs"] for one in done) == padded.sum() - capacity_bytes
    for one in done:
        assert one["ours"] == one["formula"] < one["theirs"]


def test_deepspeeds_formula_by_hand() -> None:
    """Law: 2 ranks, 4 experts, 3 tokens for the fullest: each sends 2 x 3 rows, gets as many."""
    size = RowBytes.sized(model_dim=10, item_bytes=4, top_k=1, weight_bytes=4)
    counts = np.array([[3, 0, 1, 0], [0, 0, 2, 2]])
    assert deepspeed_bytes(counts, size).tolist() == [[0, 2 * 6 * 40 + 8], [2 * 6 * 40 + 8, 0]]
    assert E % 4 == 0
