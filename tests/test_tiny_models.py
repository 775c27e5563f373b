"""Laws of the tiny models: they stand for their families and notice any change to an expert."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.tiny_models import (
    align,
    can_reload,
    experts_modules,
    families,
    greedy_ids,
    load_unmodified,
    logits_of,
    prompt,
    tiny_model,
)

MIN_MOE_LAYERS = 2
# Far above float32 noise (1e-6 of the logits' spread), far below what one expert of eight is worth.
VISIBLE = 1e-3


def routing_of(model: PreTrainedModel, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Experts module name -> `[tokens, top_k]` experts chosen in one forward pass."""
    chosen: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, arguments, name=name: chosen.update({name: arguments[1]})
        )
        for name, module in experts_modules(model).items()
    ]
    logits_of(model, input_ids)
    for hook in hooks:
        hook.remove()
    return chosen


def test_families_are_many_and_distinct() -> None:
    """Law: discovery finds each family once, and misses none of the well-known ones."""
    found = families()
    print(f"{len(found)} families; not in AutoModelForCausalLM's mapping:")
    print([name for name in found if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES])
    assert len(set(found)) == len(found)
    assert {"mixtral", "gpt_oss", "qwen3_moe", "deepseek_v3", "nemotron_h"} <= set(found)


@pytest.mark.parametrize("model_type", families())
def test_model_is_small_finite_and_routes(model_type: str) -> None:
    """Law: at least two MoE layers, each using several experts; no stored weight is constant."""
    model = tiny_model(model_type)
    assert len(experts_modules(model)) >= MIN_MOE_LAYERS
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    for name, tensor in model.state_dict().items():
        assert tensor.numel() == 1 or tensor.float().std() > 0, f"{name} is constant"
    assert torch.isfinite(logits_of(model, prompt())).all()
    for name, chosen in routing_of(model, prompt()).items():
        assert chosen.unique().numel() > chosen.shape[-1], f"{name} always picks the same experts"


@pytest.mark.parametrize("model_type", families())
def test_every_weight_of_a_used_expert_matters(model_type: str) -> None:
    """Law: zeroing any one parameter of one used expert changes the logits visibly."""
    model = tiny_model(model_type)
    expected = logits_of(model, prompt())
    for name, chosen in routing_of(model, prompt()).items():
        expert = int(chosen.flatten().mode().values)
        for parameter_name, parameter in experts_modules(model)[name].named_parameters():
            saved = parameter.data[expert].clone()
            parameter.data[expert].zero_()
            moved = (logits_of(model, prompt()) - expected).abs().max() / expected.std()
            parameter.data[expert].copy_(saved)
            assert moved > VISIBLE, f"{name}.{parameter_name}[{expert}] moved logits by {moved:.1e}"


@pytest.mark.parametrize("model_type", families())
def test_unmodified_transformers_saves_and_reloads(model_type: str, tmp_path: Path) -> None:
    """Law: plain transformers reloads what it saved, to the bit; else the family is left out."""
    assert can_reload(model_type, tmp_path) is None
    model, reloaded = tiny_model(model_type), load_unmodified(tmp_path)
    align(reloaded)
    assert torch.equal(logits_of(reloaded, prompt()), logits_of(model, prompt()))
    assert torch.equal(greedy_ids(reloaded, prompt()), greedy_ids(model, prompt()))
