"""Laws of the network that reads token ids."""

import numpy as np
import torch

from moe_runtime.predictors.path_network import MAX_BYTES, PathNetwork, PathSettings
from moe_runtime.predictors.predictor import ModelFacts
from moe_runtime.trace import Trace

# Sums in another order; float32 keeps seven digits.
TOLERANCE = 1e-4


def small(*, has_encoder: bool, context: int = 512) -> PathNetwork:
    torch.manual_seed(0)
    return PathNetwork(
        PathSettings(
            num_layers=2,
            num_experts=4,
            num_ids=10,
            num_rows=10,
            width=16,
            num_heads=2,
            ffn_width=16,
            num_encoder_blocks=int(has_encoder),
            num_decoder_blocks=2,
            context=context,
            is_softmax=False,
        )
    ).eval()


def test_the_kv_cache_changes_nothing() -> None:
    network, ids = small(has_encoder=False), torch.arange(9) % 10
    with torch.inference_mode():
        whole, _ = network.step(ids, None)
        state, parts = None, []
        for part in ids.split([4, 1, 1, 3]):
            logits, state = network.step(part, state)
            parts.append(logits)
    torch.testing.assert_close(torch.cat(parts), whole, atol=TOLERANCE, rtol=TOLERANCE)


def test_an_emitted_token_is_told_by_the_prompt_and_not_by_what_follows() -> None:
    network = small(has_encoder=True)
    with torch.inference_mode():
        _, one = network.step(torch.tensor([1, 2, 3]), None)
        _, two = network.step(torch.tensor([1, 2, 4]), None)
        after_one, _ = network.step(torch.tensor([5]), one)
        after_two, _ = network.step(torch.tensor([5]), two)
        more, _ = network.step(torch.tensor([5, 6]), one)
    assert not torch.allclose(after_one, after_two, atol=1e-6)
    torch.testing.assert_close(more[:1], after_one, atol=TOLERANCE, rtol=TOLERANCE)


def test_what_is_kept_of_a_sequence_is_bounded() -> None:
    network = small(has_encoder=False, context=4)
    state = None
    with torch.inference_mode():
        for token in range(20):
            _, state = network.step(torch.tensor([token % 10]), state)
    assert state is not None
    assert state.length == 20
    assert state.own[0].keys.shape[2] <= 5


def test_it_stays_within_its_bytes_whatever_the_vocabulary() -> None:
    topk = np.zeros((1, 48, 1), np.int16)
    trace = Trace.of({"topk": topk, "token_id": np.array([151_935]), "num_experts": 128})
    settings = PathSettings.within_budget(trace, ModelFacts.of(trace), has_encoder=True)
    network = PathNetwork(settings)
    assert sum(p.numel() * 4 for p in network.parameters()) <= MAX_BYTES
    assert settings.num_rows < settings.num_ids
    with torch.inference_mode():
        logits, _ = network.step(torch.tensor([151_935, -1, 0]), None)
    assert logits.shape == (3, 48, 128)
    assert torch.isfinite(logits).all()
