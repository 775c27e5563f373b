"""In bfloat16 several ranks are as near to a float32 run as unmodified transformers is."""

import inspect
import textwrap
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_runtime
from moe_runtime.measure.fast_parity import MAX_RATIO_ON_RANKS, MIN_POSITIONS, rms_distance
from tests.parallel.generating import prompt_logits
from tests.parallel.rank_pool import RankPool
from tests.parallel.test_tokens_are_the_same import FOLDERS, shuffled

NUM_PROMPTS, PROMPT_TOKENS = 48, 64
WAYS: dict[str, dict[str, Any]] = {
    "alltoall": {"dispatch": "alltoall"},
    "allreduce": {"dispatch": "allreduce"},
    "hierarchical": {"dispatch": "hierarchical"},
    "coherent": {"dispatch": "coherent"},
    "tensor attention": {"attention": "tensor"},
    "alltoall, exact": {"dispatch": "alltoall", "exact": True},
}


def unmodified(name: str, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        FOLDERS[name], dtype=dtype, experts_implementation="eager"
    )


@pytest.mark.parametrize("name", FOLDERS)
def test_logits_are_no_further_from_float32_than_allowed(pool: RankPool, name: str) -> None:
    """Law: root mean square over all logits of 3,072 tokens on four ranks, for every dispatcher.

    Printed beside it: what splitting a batch alone changes in unmodified transformers.
    """
    tokenizer = AutoTokenizer.from_pretrained(FOLDERS[name])
    ids = tokenizer(inspect.getsource(textwrap))["input_ids"][: NUM_PROMPTS * PROMPT_TOKENS]
    prompts = [ids[i : i + PROMPT_TOKENS] for i in range(0, len(ids), PROMPT_TOKENS)]
    assert len(ids) == NUM_PROMPTS * PROMPT_TOKENS >= MIN_POSITIONS
    with torch.no_grad():
        whole = unmodified(name, torch.float32)(torch.tensor(prompts)).logits
        eager = unmodified(name, torch.bfloat16)
        batch = list(eager(torch.tensor(prompts)).logits)
        alone = [eager(torch.tensor([prompt])).logits[0] for prompt in prompts]
    true = list(whole)
    yardstick = rms_distance(alone, true)
    assert yardstick
    split = rms_distance(batch, true)
    assert split
    model = moe_runtime.load(FOLDERS[name], warm_start=False)
    with torch.no_grad(), moe_runtime.handle(model):
        ours = [model(torch.tensor([prompt])).logits[0] for prompt in prompts]
    kernel = rms_distance(ours, true)
    assert kernel
    print(f"{name}: one process, fast path {kernel:.4g}, ratio {kernel / yardstick:.3f}")
    print(f"{name}: rms of logits {float(whole.double().square().mean() ** 0.5):.4g}")
    print(f"{name}: eager alone {yardstick:.4g}, ratio in one batch {split / yardstick:.3f}")
    placement = shuffled(name, 4, nodes=2)
    for way, options in WAYS.items():
        done = pool.run(
            prompt_logits,
            str(FOLDERS[name]),
            prompts,
            {"placement": placement} | options,
            num_ranks=4,
        )
        found = done[0]
        if "attention" not in options:
            found = [done[i % 4][i // 4] for i in range(NUM_PROMPTS)]
        distance = rms_distance(found, true)
        assert distance
        print(f"{name}: {way} {distance:.4g}, ratio {distance / yardstick:.3f}")
        assert distance <= MAX_RATIO_ON_RANKS * yardstick, way
        if "exact" in options:
            assert all(map(torch.equal, found, alone))
