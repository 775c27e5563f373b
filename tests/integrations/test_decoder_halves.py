"""Decoder layers taken apart: which families allow it, and that heads add up."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moe_runtime.errors import UnsupportedModelError
from moe_runtime.integrations.transformers.decoder_halves import DecoderHalves
from moe_runtime.integrations.transformers.head_shards import head_share
from moe_runtime.integrations.transformers.sites import find_sites
from moe_runtime.integrations.transformers.tensor_attention import _own_heads
from moe_runtime.parallel.dispatcher import Rows
from tests.tiny_models import tiny_model

# 25 of 53, as docs/expert_parallel.md says.
FAMILIES = [
    "aria_text", "axk1", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "exaone_moe",
    "flint", "glm4_moe", "glm4_moe_lite", "gpt_oss", "hunyuan_v1_moe", "hy_v3", "laguna",
    "mellum", "mimo_v2_flash", "minimax_m2", "minimax_m3_vl_text", "mistral4", "mixtral",
    "olmoe", "phimoe", "qwen2_moe", "qwen3_moe", "solar_open",
]  # fmt: skip


class Answers:
    """What experts modules ask, in place of ranks."""

    def __init__(self) -> None:
        self.hand_over: Callable[..., None] = lambda answer, *_: setattr(self, "answer", answer)
        self.answer: Any = None


def halves_of(family: str, *, in_any_order: bool) -> DecoderHalves:
    model = tiny_model(family)
    sites, answers = find_sites(model), Answers()
    for number, site in enumerate(sites):
        site.module.__dict__["forward"] = lambda hidden, index, weights, number=number: (
            answers.answer(number, Rows(hidden, index, weights))
        )
    return DecoderHalves(model, sites, answers, in_any_order=in_any_order)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_the_common_form_are_stepped(family: str) -> None:
    """Law: halves give the bits of the whole layer (the trial), dense and MoE layers told apart."""
    halves = halves_of(family, in_any_order=True)
    moe = [halves.moe_layer(layer) for layer in range(halves.num_layers)]
    assert [number for number in moe if number is not None] == list(range(halves.num_layers))[
        : len(moe) - moe.count(None)
    ]
    assert len(halves.kv_shapes) == halves.num_layers
    assert len(halves.like) == 0


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("axk2", "attention other than full or sliding by layer (indexed_attention)"),
        ("flex_olmo", "layer 0 has no input_layernorm"),
        ("jamba", "no layers with rotary positions"),
    ],
)
def test_other_families_are_refused_with_what_is_in_the_way(family: str, words: str) -> None:
    with pytest.raises(UnsupportedModelError) as refused:
        halves_of(family, in_any_order=True)
    assert words in str(refused.value)


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_the_shares_of_all_ranks_are_the_whole_attention(family: str, num_ranks: int) -> None:
    """Law: latents, sinks, biases and key heads on several ranks included; and nothing stays."""
    halves = halves_of(family, in_any_order=False)
    hidden, arguments = halves.trial_inputs(halves.num_layers - 1)
    attention = halves.layers[-1].self_attn
    with torch.no_grad():
        whole = halves.attention(halves.num_layers - 1, hidden, **arguments)
        share = _own_heads(halves, halves.num_layers - 1, 1, num_ranks)
        after = halves.attention(halves.num_layers - 1, hidden, **arguments)
        share.apply(attention)
        part = halves.attention(halves.num_layers - 1, hidden, **arguments)
    assert torch.equal(whole, after), "the trial leaves the module as it was"
    assert not torch.equal(whole, part)
    held = sum(tensor.numel() for _, name, tensor in share.parameters if name == "weight")
    assert held < sum(p.numel() for p in halves_of(family, in_any_order=False).layers[-1]
                      .self_attn.parameters())  # fmt: skip


def test_norms_over_all_heads_are_refused() -> None:
    """Law: a share of the heads cannot know the norm of all, as OLMoE's is."""
    halves = halves_of("olmoe", in_any_order=False)
    with pytest.raises(UnsupportedModelError, match="heads of layer 0 cannot be shared out"):
        _own_heads(halves, 0, 0, 2)


def test_heads_that_do_not_divide_are_refused() -> None:
    halves = halves_of("mixtral", in_any_order=False)
    with pytest.raises(ValueError, match="do not divide among 3 ranks"):
        head_share(halves.layers[0].self_attn, 0, 3)
