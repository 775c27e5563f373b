"""Laws of parts: every family's attention, norms, router and experts are told apart."""

import pytest
import torch
from torch import nn

from moe_runtime.measure.step_parts import (
    ATTENTION,
    EMBEDDING,
    EXPERTS,
    LM_HEAD,
    MLP,
    NORMS,
    ROUTER,
    NamedParts,
    parts_of,
)
from tests.tiny_models import families, tiny_model

PARTS = {ATTENTION, EMBEDDING, EXPERTS, LM_HEAD, NORMS, ROUTER}


@pytest.mark.parametrize("family", families())
def test_a_family_has_every_part_and_no_part_lies_in_another(family: str) -> None:
    model = tiny_model(family)
    found = parts_of(model)
    assert set(found.values()) - {MLP} == PARTS
    for module in found:
        assert not set(found) & set(module.modules()) - {module}


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "olmoe", "deepseek_v3", "jamba"])
def test_what_lies_in_no_part_holds_no_matrix(family: str) -> None:
    model = tiny_model(family)
    named = {p for module in parts_of(model) for p in module.parameters()}
    assert [n for n, p in model.named_parameters() if p not in named and p.dim() > 1] == []


def test_ranges_are_there_while_entered_and_are_closed_by_a_failure() -> None:
    model = tiny_model("mixtral")
    tokens = torch.tensor([[1, 2, 3]])
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]

    def fail(*_: object) -> None:
        raise RuntimeError("stop here")

    norm = next(m for m in model.modules() if "Norm" in type(m).__name__)
    bad = norm.register_forward_pre_hook(fail)
    parts = NamedParts(model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        with parts, pytest.raises(RuntimeError, match="stop here"):
            model(tokens)
        bad.remove()
        with NamedParts(model):
            model(tokens)
        model(tokens)
    ranges = [each.name for each in seen.events() if each.name.startswith("moe_runtime: ")]
    num_layers = model.config.num_hidden_layers
    assert ranges.count(f"moe_runtime: {EXPERTS}") == num_layers
    assert ranges.count(f"moe_runtime: {LM_HEAD}") == 1
    after = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert after == hooks


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="has no experts"):
        parts_of(nn.Sequential(nn.Linear(2, 2)))
