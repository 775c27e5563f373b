"""Experts on several ranks change no token: both trained checkpoints, in float32."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_runtime.cli.demo import CHECKPOINT
from moe_runtime.integrations.transformers.ep_implementation import HAS_SEAM
from moe_runtime.placement_map import Placement
from tests.parallel.generating import (
    Batch,
    continue_greedily,
    generate_by_transformers,
    generate_on_ranks,
    stop_early,
)
from tests.parallel.rank_pool import RankPool

FOLDERS = {
    "mixtral": CHECKPOINT,
    "deepseek": Path(__file__).parents[1] / "data" / "deepseek-stdlib",
}
SHAPES = {"mixtral": (6, 8), "deepseek": (6, 32)}
NEW_TOKENS = 6
TEXTS = ("def read(self, size=-1):\n    ", "import os", "class Shelf", "for i in range(10):\n")


def shuffled(model: str, num_ranks: int, *, nodes: int = 1, replicas: int = 0) -> Placement:
    """Experts in an order of chance, and on every rank `replicas` more, all of its neighbour's."""
    num_layers, num_experts = SHAPES[model]
    rng = np.random.default_rng(0)
    share = rng.permuted(np.tile(np.arange(num_experts), (num_layers, 1)), axis=1)
    share = share.reshape(num_layers, num_ranks, -1)
    slots = np.concatenate([share, np.roll(share[..., :replicas], 1, axis=1)], axis=2)
    return Placement(
        model=model,
        num_experts=num_experts,
        num_hidden_layers=num_layers,
        layer_ids=tuple(range(num_layers)),
        gpus=num_ranks,
        nodes=nodes,
        slots=slots.reshape(num_layers, -1),
    )


@pytest.fixture(scope="module")
def batches() -> dict[str, list[Batch]]:
    """By checkpoint: two prompts together, then two of one, all of unlike lengths."""
    found = {}
    for name, folder in FOLDERS.items():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = [tokenizer(text)["input_ids"] for text in TEXTS]
        shortest = min(len(ids[1]), len(ids[2]))
        found[name] = [[ids[1][:shortest], ids[2][:shortest]], [ids[0]], [ids[3]]]
    return found


@pytest.fixture(scope="module")
def expected(batches: dict[str, list[Batch]]) -> dict[str, list[list[int]]]:
    """What unmodified transformers writes, in one process."""
    found = {}
    for name, folder in FOLDERS.items():
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, experts_implementation="eager"
        )
        found[name] = continue_greedily(model, batches[name], NEW_TOKENS)
    return found


@pytest.mark.parametrize(
    ("name", "num_ranks", "dispatch", "placement", "expert_memory"),
    [
        ("mixtral", 2, "alltoall", None, "100%"),
        ("mixtral", 4, "auto", shuffled("mixtral", 4, nodes=2, replicas=1), "50%"),
        ("mixtral", 4, "allreduce", None, "50%"),
        ("mixtral", 4, "hierarchical", shuffled("mixtral", 4, nodes=2, replicas=1), "100%"),
        ("deepseek", 2, "auto", None, "100%"),
        ("deepseek", 2, "allreduce", shuffled("deepseek", 2, replicas=3), "50%"),
        ("deepseek", 4, "alltoall", shuffled("deepseek", 4, replicas=2), "50%"),
    ],
    ids=lambda value: value if isinstance(value, str | int) else type(value).__name__,
)
def test_tokens_are_those_of_one_process(
    pool: RankPool,
    batches: dict[str, list[Batch]],
    expected: dict[str, list[list[int]]],
    name: str,
    num_ranks: int,
    dispatch: str,
    placement: Placement | None,
    expert_memory: str,
) -> None:
    """Law: with prompts on two ranks of two or four, one with more to do than the other.

    And each rank read its own experts alone, and sent what its formulas say.
    """
    mine = batches[name]
    by_rank = [mine[:2], mine[2:], [], []][:num_ranks]
    done = pool.run(
        generate_on_ranks,
        str(FOLDERS[name]),
        by_rank,
        NEW_TOKENS,
        dispatch,
        placement,
        expert_memory,
        num_ranks=num_ranks,
    )
    assert [tokens for rank in done for tokens in rank["tokens"]] == expected[name]
    for rank in done:
        parallel, cache = rank["report"]["parallel"], rank["report"]["cache"]
        assert not rank["strangers"]
        assert parallel["moe_bytes"] == parallel["moe_predicted_bytes"] > 0
        assert parallel["forwards"] == 2 * NEW_TOKENS
        share = parallel["experts_held"]
        assert cache["slots"] == (share if expert_memory == "100%" else share // 2)
        if expert_memory == "100%":
            assert cache["misses"] <= share, "each expert is read once"
    held = sum(rank["report"]["parallel"]["experts_held"] for rank in done)
    assert held == np.prod(SHAPES[name]) + (0 if placement is None else placement_extra(placement))


def placement_extra(placement: Placement) -> int:
    return placement.num_layers * (placement.num_slots - placement.num_experts)


@pytest.mark.filterwarnings("ignore:hidden states are rounded to int8")
def test_a_rounded_payload_is_for_those_who_ask(
    pool: RankPool, batches: dict[str, list[Batch]]
) -> None:
    """Law: fewer bytes, counted as foretold, and the report names it; its tokens are its own."""
    by_rank = [batches["mixtral"][1:2], batches["mixtral"][2:]]
    folder = str(FOLDERS["mixtral"])
    options = (folder, by_rank, 1, "alltoall", None, "100%")
    exact = pool.run(generate_on_ranks, *options, num_ranks=2)
    rounded = pool.run(generate_on_ranks, *options, "int8", num_ranks=2)
    for one, other in zip(rounded, exact, strict=True):
        mine, theirs = one["report"]["parallel"], other["report"]["parallel"]
        assert (mine["payload"], theirs["payload"]) == ("int8", "exact")
        assert mine["moe_bytes"] == mine["moe_predicted_bytes"] < 0.5 * theirs["moe_bytes"]


def test_a_rank_that_is_asked_to_stop_ends_all_at_the_next_token(
    pool: RankPool, batches: dict[str, list[Batch]]
) -> None:
    """Law: rank 1, without prompts, is asked; rank 0 ends its first prompt after one token."""
    prompt = batches["mixtral"][1][0]
    reasons = pool.run(stop_early, str(CHECKPOINT), prompt, num_ranks=2)
    assert reasons == [["terminated", "1"], []]


def test_transformers_own_expert_parallelism_runs_ours(
    pool: RankPool, batches: dict[str, list[Batch]], expected: dict[str, list[list[int]]]
) -> None:
    """Law: the same tokens on every rank, and every byte is in the formula.

    Of the two checkpoints this is the one whose attention transformers splits into four.
    """
    if not HAS_SEAM:
        pytest.skip("this transformers has no EPImplementationInterface; 5.23 does")
    name = "deepseek"
    done = pool.run(
        generate_by_transformers, str(FOLDERS[name]), batches[name], 3, "moe_runtime", num_ranks=4
    )
    for rank in done:
        assert rank["tokens"] == [tokens[:3] for tokens in expected[name]]
        assert rank["modules"] == SHAPES[name][0]
        assert rank["bytes"] == rank["predicted"] > 0
