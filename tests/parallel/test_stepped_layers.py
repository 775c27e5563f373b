"""Decoder layers that are stepped on ranks: tokens are those of one process, bytes as foretold."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_runtime.cli.demo import CHECKPOINT
from moe_runtime.errors import ParallelError, PlacementError
from moe_runtime.integrations.transformers.ranks import Ranks
from moe_runtime.placement.cocluster import DeviceTables
from moe_runtime.placement_map import Placement
from moe_runtime.trace_file import Member, write_npz
from tests.parallel.generating import (
    Batch,
    continue_greedily,
    continue_padded,
    error_of,
    generate_with,
)
from tests.parallel.rank_pool import RankPool
from tests.parallel.test_tokens_are_the_same import (
    FOLDERS,
    NEW_TOKENS,
    SHAPES,
    batches,
    expected,
    shuffled,
)
from tests.tiny_checkpoint import save_mixtral
from tests.tiny_models import can_reload, load_unmodified

__all__ = ["batches", "expected"]  # fixtures


def random_tables(model: str, num_ranks: int, num_ids: int = 1500) -> DeviceTables:
    """Foretell anything; the demo checkpoints have 2,048 ids."""
    rng = np.random.default_rng(7)
    layers = SHAPES[model][0]
    pairs = (layers, num_ranks, num_ranks)
    return DeviceTables(
        token_group=rng.integers(0, num_ranks, (layers, num_ids)).astype(np.int32),
        token_confidence=rng.integers(0, 2, (layers, num_ids)).astype(np.float32),
        bigram_group=rng.integers(0, num_ranks, pairs).astype(np.int32),
        bigram_confidence=rng.integers(0, 2, pairs).astype(np.float32),
    )


@pytest.mark.parametrize(
    ("name", "num_ranks", "placement", "expert_memory"),
    [
        ("mixtral", 2, None, "100%"),
        ("mixtral", 4, shuffled("mixtral", 4, nodes=2, replicas=1), "50%"),
        ("deepseek", 2, shuffled("deepseek", 2, replicas=3), "50%"),
        ("deepseek", 4, None, "100%"),
    ],
    ids=lambda value: value if isinstance(value, str | int) else type(value).__name__,
)
def test_coherent_dispatch_changes_no_token(
    pool: RankPool,
    batches: dict[str, list[Batch]],
    expected: dict[str, list[list[int]]],
    name: str,
    num_ranks: int,
    placement: Placement | None,
    expert_memory: str,
) -> None:
    """Law: with uneven prompts on two ranks and none on the others, in prefill and decode.

    There is one all-to-all a MoE layer and forward, and every byte is in the formula, those of
    keys and values included.
    """
    mine = batches[name]
    options = {"dispatch": "coherent", "placement": placement, "expert_memory": expert_memory}
    by_rank = [mine[:2], mine[2:], [], []][:num_ranks]
    done = pool.run(
        generate_with, str(FOLDERS[name]), by_rank, NEW_TOKENS, options, num_ranks=num_ranks
    )
    assert [tokens for rank in done for tokens in rank["tokens"]] == expected[name]
    for rank in done:
        parallel = rank["report"]["parallel"]
        assert parallel["dispatch"] == "coherent"
        assert parallel["forwards"] == 2 * NEW_TOKENS
        assert parallel["calls"]["all_to_all"] == SHAPES[name][0] * 2 * NEW_TOKENS
        assert parallel["moe_bytes"] == parallel["moe_predicted_bytes"]
        assert 0 < parallel["context_bytes"] < parallel["moe_bytes"]


@pytest.mark.parametrize(
    ("name", "num_ranks", "options"),
    [
        ("mixtral", 2, {"attention": "tensor", "expert_memory": "50%"}),
        ("mixtral", 4, {"attention": "tensor", "tables": random_tables("mixtral", 4)}),
        (
            "deepseek",
            4,
            {
                "attention": "tensor",
                "tables": random_tables("deepseek", 4),
                "placement": shuffled("deepseek", 4, replicas=2),
                "expert_memory": "50%",
            },
        ),
    ],
    ids=["slices", "key heads on two ranks each", "latent attention, replicas"],
)
def test_tensor_attention_changes_no_token(
    pool: RankPool,
    batches: dict[str, list[Batch]],
    expected: dict[str, list[list[int]]],
    name: str,
    num_ranks: int,
    options: dict[str, Any],
) -> None:
    """Law: whatever tables foretell, on every rank; and every byte is in the formula."""
    done = pool.run(
        generate_with,
        str(FOLDERS[name]),
        [batches[name]] * num_ranks,
        NEW_TOKENS,
        options,
        num_ranks=num_ranks,
    )
    pairs = 0
    for rank in done:
        assert rank["tokens"] == expected[name]
        parallel = rank["report"]["parallel"]
        assert parallel["moe_bytes"] == parallel["moe_predicted_bytes"]
        assert 0 < parallel["attention_bytes"] < parallel["moe_bytes"]
        pairs += parallel["activations"]["seen_pairs"] + parallel["activations"]["unseen_pairs"]
    tokens = sum(len(batch) * (len(batch[0]) + NEW_TOKENS - 1) for batch in batches[name])
    top_k = {"mixtral": 2, "deepseek": 4}[name]
    assert pairs == tokens * top_k * SHAPES[name][0], "every pair is counted on one rank"


def test_speculative_dispatch_of_own_prompts_counts_local_experts(
    pool: RankPool, batches: dict[str, list[Batch]], expected: dict[str, list[list[int]]]
) -> None:
    """Law: with whole attention tables move no row; what they have seen is counted apart."""
    mine = batches["deepseek"]
    options = {"tables": random_tables("deepseek", 2, num_ids=600)}
    done = pool.run(
        generate_with, str(FOLDERS["deepseek"]), [mine[:2], mine[2:]], NEW_TOKENS, options,
        num_ranks=2,
    )  # fmt: skip
    assert [tokens for rank in done for tokens in rank["tokens"]] == expected["deepseek"]
    for rank in done:
        parallel = rank["report"]["parallel"]
        assert parallel["dispatch"] == "speculative"
        counts = parallel["activations"]
        assert 0 < counts["seen_local_pairs"] < counts["seen_pairs"]
        assert counts["unseen_pairs"] > 0


def test_padding_on_the_left_changes_no_token(
    pool: RankPool, batches: dict[str, list[Batch]]
) -> None:
    """Law: tokens that the mask hides are nowhere, and rank 1 without prompts serves."""
    prompts = [batches["mixtral"][1][0], batches["mixtral"][2][0][:2]]
    found = pool.run(continue_padded, str(CHECKPOINT), prompts, NEW_TOKENS, num_ranks=2)
    assert found == [continue_padded(None, str(CHECKPOINT), prompts, NEW_TOKENS), None]


@pytest.mark.parametrize(
    ("options", "arguments", "words"),
    [
        ({"dispatch": "coherent"}, {"num_beams": 2}, "as beam search and assisted generation do"),
        (
            {"dispatch": "coherent"},
            {"output_hidden_states": True, "return_dict_in_generate": True},
            "output_hidden_states shows layers of one process",
        ),
        (
            {"dispatch": "coherent"},
            {"cache_implementation": "static"},
            "the cache is a StaticCache; use transformers' DynamicCache",
        ),
        (
            {"attention": "tensor", "tables": random_tables("deepseek", 4)},
            {},
            "the tables are for 4 GPUs and 6 MoE layers, and there are 2 ranks and 6 layers",
        ),
    ],
    ids=["beams", "hidden states", "another cache", "tables of another placement"],
)
def test_what_cannot_be_is_refused_on_every_rank(
    pool: RankPool, options: dict[str, Any], arguments: dict[str, Any], words: str
) -> None:
    for said in pool.run(error_of, str(CHECKPOINT), options, arguments, num_ranks=2):
        assert words in said


@pytest.mark.parametrize(
    "family", ["exaone_moe", "flint", "gpt_oss", "laguna", "mellum", "mimo_v2_flash"]
)
def test_windows_are_kept_where_tokens_move(pool: RankPool, tmp_path: Path, family: str) -> None:
    """Law: windowed layers beside full ones, and rotations by type of layer, change no token.

    Prompts are longer than the window of 6 tokens.
    """
    folder = tmp_path / family
    assert can_reload(family, folder) is None
    prompts = [[[5 + 7 * i % 150 for i in range(length)]] for length in (9, 14)]
    options = {"dispatch": "coherent"}
    done = pool.run(
        generate_with, str(folder), [prompts, prompts[:1]], NEW_TOKENS, options, num_ranks=2
    )
    alone = continue_greedily(load_unmodified(folder, torch.float32), prompts, NEW_TOKENS)
    assert [rank["tokens"] for rank in done] == [alone, alone[:1]]


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"sliding_window": 4}, {"dispatch": "coherent"}, "by layer (a window of all)"),
        (
            {"num_attention_heads": 1, "num_key_value_heads": 1},
            {"attention": "tensor"},
            "1 heads, 1 of keys, do not divide among 2 ranks",
        ),
    ],
    ids=["a window", "heads"],
)
def test_models_whose_layers_cannot_be_stepped_are_refused_with_the_remedy(
    pool: RankPool,
    tmp_path: Path,
    changes: dict[str, Any],
    options: dict[str, Any],
    words: str,
) -> None:
    folder = save_mixtral(tmp_path, **changes)
    for said in pool.run(error_of, str(folder), options, {}, num_ranks=2):
        assert said.startswith("UnsupportedModelError: the decoder layers of MixtralForCausalLM")
        assert words in said
        assert "use dispatch alltoall, allreduce or auto" in said


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"attention": "halves"}, ValueError, "choose from data, tensor"),
        ({"dispatch": "coherent", "attention": "tensor"}, ParallelError, "choose alltoall, or"),
        ({"dispatch": "speculative"}, ParallelError, "give both dispatch='speculative' and tables"),
        (
            {"dispatch": "auto", "tables": random_tables("mixtral", 2)},
            ParallelError,
            "which no other does",
        ),
        ({"dispatch": "coherent", "payload": "int8"}, ParallelError, "sends others"),
        ({"attention": "tensor", "pipeline": 2}, ParallelError, "sends others"),
    ],
    ids=["unknown", "two ways", "no tables", "tables for nobody", "rounded", "in chunks"],
)
def test_modes_that_contradict_are_refused_before_ranks_meet(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    nothing: dict[str, Any] = {
        "mesh": None, "placement": None, "dispatch": None, "attention": None, "tables": None,
        "payload": "exact", "pipeline": 1,
        "timeout_seconds": None, "device": None, "exact": False, "predictor": "off",
    }  # fmt: skip
    with pytest.raises(error, match=words):
        Ranks.join(**nothing | options)


def test_tables_come_back_from_their_file(tmp_path: Path) -> None:
    """Law: every array as it was; a confidence that is no share is refused by name."""
    made = random_tables("mixtral", 2, num_ids=9)
    arrays = {field.name: getattr(made, field.name) for field in fields(made)}
    file = tmp_path / "tables.npz"
    write_npz(file, [Member.of(name, array) for name, array in arrays.items()])
    found = DeviceTables.load(file)
    assert all(np.array_equal(getattr(found, name), array) for name, array in arrays.items())
    arrays["token_confidence"] = arrays["token_confidence"] * np.float32(np.nan)
    write_npz(file, [Member.of(name, array) for name, array in arrays.items()])
    with pytest.raises(PlacementError, match="token_confidence is not within 0 and 1; make it"):
        DeviceTables.load(file)


def test_tables_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "tables.npz").write_bytes(b"PK nothing")
    with pytest.raises(PlacementError, match="placement solve --tables"):
        DeviceTables.load(tmp_path / "tables.npz")
