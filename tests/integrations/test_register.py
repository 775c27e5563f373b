"""`experts_implementation="moe_runtime"` computes what eager does, and names what it cannot."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import moe_runtime
from moe_runtime.integrations.transformers import register as resident
from moe_runtime.integrations.transformers.experts import reference_forward
from moe_runtime.integrations.transformers.fast import find_gate
from moe_runtime.integrations.transformers.grouped import find_gate as find_grouped_gate
from moe_runtime.integrations.transformers.proof import expert_math
from moe_runtime.integrations.transformers.register import (
    NAME,
    ResidentExperts,
    experts_path,
    register,
)
from moe_runtime.kernels.cpu import experts as face
from moe_runtime.kernels.cpu.experts import CpuExperts
from moe_runtime.kernels.cpu.library import NOT_BUILT
from moe_runtime.kernels.cpu.operation import Gate
from moe_runtime.kernels.gate import Gate as GroupedGate
from moe_runtime.layer import Accumulator
from tests.tiered_world import needs_interpreter
from tests.tiny_models import (
    SIZES,
    experts_modules,
    families,
    greedy_ids,
    logits_of,
    prompt,
    tiny_model,
)

needs_kernel = pytest.mark.skipif(
    CpuExperts.load(torch.float32) is None, reason=CpuExperts.status(torch.float32)
)
# What the kernel leaves to torch, and why.
LEFT_OUT = {
    "aria_text": "transposed weights",
    "gpt_oss": "transposed weights and biases",
    "muse_spark": "a norm behind each expert",
    "openai_privacy_filter": "transposed weights and biases",
}
CLOSE = 1e-5  # float32 in another order of sums


def routing(module: Any, num_tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(num_tokens)
    up = module.gate_up_proj if module.has_gate else module.up_proj
    num_experts, dim = up.shape[0], up.shape[1 if module.is_transposed else 2]
    hidden = torch.randn(num_tokens, dim, generator=generator).to(dtype)
    index = torch.rand(num_tokens, num_experts, generator=generator).argsort(-1)[:, :2]
    return hidden, index, torch.rand(num_tokens, 2, generator=generator)


@needs_kernel
@pytest.mark.parametrize("family", families())
def test_every_family_is_computed_or_named(family: str) -> None:
    """Law: experts of every family equal its own forward in float32, or fall back with a reason."""
    module: Any = next(iter(experts_modules(tiny_model(family)).values()))
    inputs = routing(module, 5, torch.float32)
    path = experts_path(module)
    with torch.no_grad():
        expected = reference_forward(type(module))(module, *inputs)
        found = ResidentExperts()(module, *inputs)
    if family in LEFT_OUT:
        assert path == f"grouped_mm ({LEFT_OUT[family]})"
    else:
        assert path.partition(",")[0] in face.LEVELS
    torch.testing.assert_close(found, expected, rtol=CLOSE, atol=CLOSE * float(expected.norm()))


@pytest.mark.parametrize(
    ("family", "gate"), [("mixtral", Gate.SILU), ("nemotron_h", Gate.RELU_SQUARED)]
)
def test_gates_are_found_by_trying(family: str, gate: Gate) -> None:
    module = next(iter(experts_modules(tiny_model(family)).values()))
    math = expert_math(module, Accumulator.FLOAT32)
    assert math is not None
    assert find_gate(module, math) == (gate, False)


def test_a_clamp_is_not_overlooked() -> None:
    """Law: a gate that differs for large numbers only is left to torch."""
    module: Any = next(iter(experts_modules(tiny_model("mixtral")).values()))
    module._apply_gate = lambda v: type(module)._apply_gate(module, v.clamp(-50, 50))
    math = expert_math(module, Accumulator.FLOAT32)
    assert math is not None
    found, _ = find_gate(module, math)
    assert not isinstance(found, Gate)


@pytest.fixture
def loaded(checkpoint: Any) -> Any:
    register()
    register()  # twice is once
    return AutoModelForCausalLM.from_pretrained(checkpoint("mixtral"), experts_implementation=NAME)


@needs_kernel
def test_from_pretrained_takes_the_name(loaded: Any, checkpoint: Any) -> None:
    """Law: greedy tokens in float32 are the unmodified model's, and logits are close."""
    eager = AutoModelForCausalLM.from_pretrained(
        checkpoint("mixtral"), experts_implementation="eager"
    )
    assert experts_path(loaded) in face.LEVELS
    torch.testing.assert_close(logits_of(loaded, prompt()), logits_of(eager, prompt()))
    assert torch.equal(greedy_ids(loaded, prompt()), greedy_ids(eager, prompt()))


def test_new_weights_are_used(loaded: Any) -> None:
    """Law: a cast, or other parameters, change the output as they would in transformers."""
    ids = prompt()
    logits_of(loaded, ids)
    halved = copy.deepcopy(loaded)
    for module in experts_modules(halved).values():
        module.down_proj = nn.Parameter(module.down_proj.detach() * 0)
    wide = loaded.to(torch.float64)
    for ours in (wide, halved):
        eager = copy.deepcopy(ours)
        eager.set_experts_implementation("eager")
        torch.testing.assert_close(logits_of(ours, ids), logits_of(eager, ids))


def test_gradients_take_the_fallback(loaded: Any) -> None:
    """Law: training works, with grouped_mm."""
    loaded.train()
    loaded(prompt()).logits.sum().backward()
    assert all(m.down_proj.grad is not None for m in experts_modules(loaded).values())


def test_without_the_library_grouped_mm_is_named(
    loaded: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(face, "open_experts_library", lambda: NOT_BUILT)
    monkeypatch.setattr(face, "experts_status", lambda dtype: NOT_BUILT)
    assert experts_path(loaded).startswith("grouped_mm (no compiled library")
    register()
    with caplog.at_level(logging.INFO, logger="moe_runtime"):
        logits_of(loaded, prompt())
        logits_of(loaded, prompt())
    said = [record for record in caplog.records if "no compiled library" in record.getMessage()]
    assert len(said) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_offloaded_and_resident_have_the_same_bits(checkpoint: Any, dtype: str) -> None:
    """Law: what is cached never changes a bit; a quarter of the experts or all of them."""
    name = "mixtral" if dtype == "float32" else "mixtral_bf16"
    found = []
    for memory in ("30%", "100%"):
        model = moe_runtime.load(checkpoint(name), expert_memory=memory)
        with moe_runtime.handle(model) as handle:
            found.append((logits_of(model, prompt()), logits_of(model, prompt(1, 1))))
            assert handle.report()["settings"]["experts"] == CpuExperts.status(
                getattr(torch, dtype)
            )
    register()
    resident: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint(name), experts_implementation=NAME, dtype=dtype
    )
    found.append((logits_of(resident, prompt()), logits_of(resident, prompt(1, 1))))
    for prefill, step in found[1:]:
        assert torch.equal(step, found[0][1])
        assert torch.equal(prefill, found[0][0])


def test_exact_and_linears_exclude_each_other(checkpoint: Any) -> None:
    with pytest.raises(ValueError, match="leave out one of them"):
        moe_runtime.load(checkpoint("mixtral"), exact=True, linears=True)


def test_linears_compute_few_tokens(checkpoint: Any, tmp_path: Path) -> None:
    """Law: linear layers by the kernel give the same float32 numbers, and can be undone."""
    from moe_runtime.integrations.transformers.linears import (
        FewTokensLinear,
        slow_down_linears,
        speed_up_linears,
    )

    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint("mixtral"))
    before = [logits_of(model, prompt(1, n)) for n in (1, 3, 12)]
    num_linears = sum(type(module) is nn.Linear for module in model.modules())
    if CpuExperts.load(torch.float32) is None:
        assert speed_up_linears(model) == 0
        return
    assert speed_up_linears(model) == num_linears
    for expected, n in zip(before, (1, 3, 12), strict=True):
        torch.testing.assert_close(logits_of(model, prompt(1, n)), expected)
    assert any(m._few is not None for m in model.modules() if isinstance(m, FewTokensLinear))
    model.save_pretrained(tmp_path)
    again: Any = copy.deepcopy(model).to(torch.bfloat16)
    assert logits_of(again, prompt(1, 1)).isfinite().all()
    model(prompt(1, 2)).logits.sum().backward()
    slow_down_linears(model)
    assert not any(isinstance(module, FewTokensLinear) for module in model.modules())
    assert torch.equal(logits_of(model, prompt(1, 1)), before[0])


def grouped_plan(module: nn.Module) -> Any:
    """What a GPU would run, interpreted."""
    math = expert_math(module, Accumulator.FLOAT32)
    assert math is not None
    return resident._grouped_plan(module, math)


@needs_interpreter
@pytest.mark.parametrize(
    ("family", "path"),
    [
        ("mixtral", "triton"),
        ("gpt_oss", "triton"),  # transposed, interleaved, clamped, with biases
        ("aria_text", "triton"),  # transposed
        ("nemotron_h", "triton, gate in torch"),  # no gate to multiply with
    ],
)
def test_grouped_products_of_fused_parameters(family: str, path: str) -> None:
    """Law: Triton over a module's own parameters computes what the family's own forward does."""
    module: Any = next(iter(experts_modules(tiny_model(family)).values()))
    plan = grouped_plan(module)
    assert plan.path == path
    inputs = routing(module, 3, torch.float32)
    with torch.no_grad():
        expected = reference_forward(type(module))(module, *inputs)
        found = plan.grouped.kernel.run(*inputs, plan.grouped.stacked, plan.grouped.slots_E)[0]
    torch.testing.assert_close(found, expected, atol=CLOSE, rtol=CLOSE)


@needs_interpreter
def test_transformers_calls_grouped_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: the registered function hands a layer to Triton, and one that trains to grouped_mm."""
    monkeypatch.setattr(resident, "_plan", grouped_plan)
    module: Any = next(iter(experts_modules(tiny_model("mixtral")).values()))
    inputs, ours = routing(module, 2, torch.float32), ResidentExperts()
    with torch.no_grad():
        expected = reference_forward(type(module))(module, *inputs)
        torch.testing.assert_close(ours(module, *inputs), expected, atol=CLOSE, rtol=CLOSE)
    assert experts_path(module) == "triton"
    ours(module, *inputs).sum().backward()
    assert module.down_proj.grad is not None


def test_gates_of_grouped_products() -> None:
    """Law: gates are found by trying; what Triton lacks runs in torch, and what differs is seen."""
    found = {}
    for model_type in ("mixtral", "gpt_oss", "nemotron_h"):
        module = next(iter(experts_modules(tiny_model(model_type)).values()))
        math = expert_math(module, Accumulator.FLOAT32)
        assert math is not None
        found[model_type] = find_grouped_gate(module, math)
    assert found["mixtral"] == GroupedGate()
    assert found["gpt_oss"] == GroupedGate(
        activation="clamped", is_interleaved=True, limit=SIZES["swiglu_limit"]
    )
    assert found["nemotron_h"] is None
