"""Batches formed by expected experts change when a sequence runs, never what it says."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from moe_runtime import generate_batches, handle, load
from moe_runtime.errors import PredictorError, UnsupportedModelError
from moe_runtime.integrations.transformers.next_token import Sampling
from moe_runtime.integrations.transformers.sites import ExpertSite, find_sites
from moe_runtime.measure.prompt import load_tokenizer
from moe_runtime.predictors.frequency import Frequency
from moe_runtime.predictors.predictor import Fingerprint
from moe_runtime.predictors.token_table import TokenTable
from tests.tiny_checkpoint import NUM_EXPERTS, NUM_LAYERS, TOP_K, save_mixtral
from tests.tiny_models import tiny_model

VOCABULARY = 257
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixtral(tmp_path_factory.mktemp("mixtral"), sliding_window=None)


@pytest.fixture
def always_exchanges(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if experts were large, so that every saved one pays for moving the attention cache."""
    monkeypatch.setattr(ExpertSite, "expert_bytes", 2**40)


def prompts(number: int, seed: int = 0, vocabulary: int = VOCABULARY) -> list[list[int]]:
    """Token ids of uneven lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocabulary, rng.integers(1, 20)).tolist() for _ in range(number)]


def table(
    seed: int = 0,
    num_layers: int = NUM_LAYERS,
    num_experts: int = NUM_EXPERTS,
    vocabulary: int = VOCABULARY,
) -> TokenTable:
    """Expects something else after each token, and has nothing to do with any model."""
    shape = vocabulary + 1, num_layers, num_experts
    return TokenTable(
        fingerprint=Fingerprint(
            model="tiny", num_layers=num_layers, num_experts=num_experts, top_k=TOP_K
        ),
        shares=np.random.default_rng(seed).random(shape).astype(np.float32),
        row_of_id=np.arange(vocabulary, dtype=np.int32),
    )


def alone(model: PreTrainedModel, ids: list[int], **options: Any) -> list[int]:
    """What plain `generate()` writes after one prompt."""
    inputs = torch.tensor([ids])
    options = {"do_sample": False} | options
    output: Any = model.generate(  # type: ignore[operator]
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=NEW_TOKENS, **options
    )
    written: list[int] = output[0, len(ids) :].tolist()
    return written


@pytest.mark.usefixtures("always_exchanges")
@pytest.mark.parametrize("predict", [False, True])
@pytest.mark.parametrize("memory", ["auto", "40%"])
def test_every_sequence_is_as_if_it_ran_alone(checkpoint: Path, predict: bool, memory: str) -> None:
    expected = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    # Some sequences end early, so that batches shrink, empty and merge.
    expected.generation_config.eos_token_id = list(range(40))
    model = load(checkpoint, expert_memory=memory, dtype=torch.float32)
    model.generation_config.eos_token_id = list(range(40))
    ids = prompts(21)
    heard: list[tuple[int, int]] = []
    with handle(model):
        found = generate_batches(
            model,
            ids,
            predictor=table() if predict else None,
            batch_size=4,
            max_new_tokens=NEW_TOKENS,
            on_progress=lambda done, total: heard.append((done, total)),
        )
    assert [sequence.token_ids for sequence in found.sequences] == [alone(expected, i) for i in ids]
    assert [sequence.prompt_ids for sequence in found.sequences] == ids
    ends = {sequence.finish_reason for sequence in found.sequences}
    assert ends == {"stop", "length"}
    assert heard == [(done, 21) for done in range(1, 22)]
    assert found.report.units == 3
    if predict:
        assert found.report.expected_experts < found.report.expected_unmoved
        assert found.report.kv_bytes_copied > 0


@pytest.mark.usefixtures("always_exchanges")
@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_next", "deepseek_v3", "qwen3_5_moe_text"])
def test_caches_of_every_kind_follow_their_sequences(family: str) -> None:
    """Windows, compressed keys and linear attention; full attention is the test above."""
    torch.manual_seed(0)
    model = tiny_model(family).float().eval()
    vocabulary = model.config.get_text_config().vocab_size
    sites = find_sites(model)
    ids = prompts(10, seed=1, vocabulary=vocabulary)
    found = generate_batches(
        model,
        ids,
        predictor=table(1, len(sites), sites[0].num_experts, vocabulary),
        batch_size=3,
        max_new_tokens=NEW_TOKENS,
    )
    assert found.report.exchanges > 3
    assert [sequence.token_ids for sequence in found.sequences] == [alone(model, i) for i in ids]


def test_a_sequence_draws_the_same_whoever_runs_beside_it(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    options: dict[str, Any] = {
        "temperature": 0.7, "top_k": 40, "top_p": 0.9, "seed": 5, "max_new_tokens": NEW_TOKENS,
    }  # fmt: skip
    ids = prompts(6)
    together = generate_batches(model, ids, batch_size=4, **options).sequences
    one_by_one = generate_batches(model, ids, batch_size=1, predictor=table(), **options).sequences
    assert together == one_by_one
    greedy = generate_batches(model, ids, max_new_tokens=NEW_TOKENS).sequences
    assert [s.token_ids for s in together] != [s.token_ids for s in greedy]


@pytest.mark.parametrize("expert_bytes", [1, 40_000, 2**40])
def test_nothing_moves_that_costs_more_than_it_saves(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, expert_bytes: int
) -> None:
    monkeypatch.setattr(ExpertSite, "expert_bytes", expert_bytes)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    long = [[int(t) for t in np.random.default_rng(s).integers(3, 250, 60)] for s in range(8)]
    report = generate_batches(model, long, predictor=table(), batch_size=4, max_new_tokens=8).report
    saved = report.expected_unmoved - report.expected_experts
    assert report.kv_bytes_copied <= saved * expert_bytes
    assert (report.exchanges > 0) == (expert_bytes > 1)


def test_texts_come_back_as_texts(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = load_tokenizer(checkpoint)
    found = generate_batches(model, ["ab", "c"], tokenizer=tokenizer, max_new_tokens=5).sequences
    assert [sequence.text for sequence in found] == [
        tokenizer.decode(sequence.token_ids, skip_special_tokens=True) for sequence in found
    ]
    assert generate_batches(model, [], tokenizer=tokenizer).sequences == []


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prompts": ["text"]}, ValueError, "prompt 0 is text, and no tokenizer was given"),
        ({"prompts": [[1], []]}, ValueError, "prompt 1 is empty"),
        ({"prompts": [[1] * 90]}, ValueError, r"90 tokens.*max_new_tokens \(64\).*context of 96"),
        ({"batch_size": 0}, ValueError, r"batch_size \(0\).*at least 1"),
        ({"temperature": -1.0}, ValueError, "must not be negative"),
        ({"top_p": 0.5}, ValueError, "no effect on greedy decoding"),
        ({"predictor": table(num_layers=7)}, PredictorError, "7 layers.*3 layers of 6 experts"),
        ({"predictor": "absent.safetensors"}, PredictorError, "cannot be read"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_does(
    checkpoint: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with pytest.raises(error, match=message):
        generate_batches(model, **{"prompts": [[5, 6]]} | change)


def test_a_predictor_must_work_from_token_ids_alone(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    frequency = Frequency(
        fingerprint=table().fingerprint, shares=np.zeros((NUM_LAYERS, NUM_EXPERTS), np.float32)
    )
    with pytest.raises(PredictorError, match=r"frequency needs no token ids.*token_table"):
        generate_batches(model, [[5]], predictor=frequency)


def test_a_model_without_experts_is_refused() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 16}
    llama = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes))
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM has no experts"):
        generate_batches(llama, [[5]])


def test_a_full_cut_is_no_draw() -> None:
    assert len(Sampling(temperature=1.0).warpers()) == 0
    assert len(Sampling(temperature=0.5, top_k=2, top_p=0.3).warpers()) == 3
