"""With exact=True the bits of several ranks are those of unmodified transformers in one process."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_runtime.parallel.plan import ExpertPlan
from moe_runtime.placement_map import Placement
from tests.parallel.generating import exact_logits, generate_logits
from tests.parallel.rank_pool import RankPool
from tests.parallel.test_tokens_are_the_same import FOLDERS, TEXTS, shuffled

NEW_TOKENS = 4


@pytest.mark.parametrize(
    ("name", "num_ranks", "dispatch", "placement", "expert_memory"),
    [
        ("mixtral", 4, "auto", shuffled("mixtral", 4, nodes=2, replicas=1), "50%"),
        ("deepseek", 2, "alltoall", None, "100%"),
    ],
    ids=["mixtral", "deepseek"],
)
def test_logits_equal_those_of_one_process_in_every_bit(
    pool: RankPool,
    name: str,
    num_ranks: int,
    dispatch: str,
    placement: Placement | None,
    expert_memory: str,
) -> None:
    """Law: in bfloat16, in prompts and decoding, beside other ranks' tokens and without any."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDERS[name])
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    by_rank = [prompts[:1], prompts[1:], [], []][:num_ranks]
    options: dict[str, Any] = {
        "dispatch": dispatch, "placement": placement, "expert_memory": expert_memory
    }  # fmt: skip
    done = pool.run(
        exact_logits, str(FOLDERS[name]), by_rank, NEW_TOKENS, options, num_ranks=num_ranks
    )
    model = AutoModelForCausalLM.from_pretrained(
        FOLDERS[name], dtype=torch.bfloat16, experts_implementation="eager"
    )
    expected = generate_logits(model, prompts, NEW_TOKENS)
    found = [logits for rank in done for logits in rank["logits"]]
    assert all(map(torch.equal, found, expected))
    for rank in done:
        parallel = rank["parallel"]
        assert parallel["dispatch"] == "alltoall"
        assert parallel["moe_bytes"] == parallel["moe_predicted_bytes"] > 0


def test_a_steady_plan_sends_all_rows_of_an_expert_to_one_holder() -> None:
    """Law: whatever token asks, its nearest holder is the same; ranks take turns among replicas."""
    placement = shuffled("mixtral", 4, nodes=2, replicas=1)
    index = torch.arange(8).repeat(5, 1)
    for rank in range(4):
        steady = ExpertPlan.of(placement, rank, is_steady=True).nearest
        usual = ExpertPlan.of(placement, rank).nearest
        for layer in range(placement.num_layers):
            owner = steady.owners(layer, index, first_turn=0)
            assert torch.equal(owner, owner[:1].expand(5, -1))
            turns = [usual.owners(layer, index[:1], first_turn=turn)[0] for turn in range(4)]
            assert all((owner[0] == torch.stack(turns)).any(0))
