"""The C kernel stands in for torch where, and only where, it was proven to give the same bits."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, MixtralConfig, MixtralForCausalLM

import moe_runtime
from moe_runtime.integrations.transformers.experts import OffloadedExperts
from moe_runtime.kernels.cpu.gemv import CpuGemv

needs_gemv = pytest.mark.skipif(
    CpuGemv.load() is None, reason=f"computed by {CpuGemv.status()} on this machine"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 Mixtral wide enough for oneDNN's kernels."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=300,
        hidden_size=256,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=3,
        initializer_range=0.1,
    )
    folder = tmp_path_factory.mktemp("wide-mixtral")
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def load(folder: Path, **settings: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few slots are the point
        return moe_runtime.load(folder, expert_memory="40%", exact=True, **settings)


def row_kernels(model: Any) -> list[object]:
    return [
        m._math and m._math.row_kernel for m in model.modules() if isinstance(m, OffloadedExperts)
    ]


@torch.no_grad()
def step_logits(model: Any, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Logits of each step when the columns of `tokens_BS` are fed one at a time."""
    cache = DynamicCache(config=model.config)
    steps = [model(column, past_key_values=cache).logits for column in tokens_BS.split(1, dim=1)]
    return torch.cat(steps, dim=1)


@needs_gemv
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_steps_equal_eager_in_every_bit(folder: Path, batch: int) -> None:
    """Law: one token, or several that share experts or not, give eager's bits."""
    reference = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    model = load(folder)
    assert all(row_kernels(model))
    tokens = torch.randint(0, 300, (batch, 24), generator=torch.Generator().manual_seed(batch))
    assert torch.equal(step_logits(model, tokens), step_logits(reference, tokens))


@needs_gemv
def test_another_number_of_threads_goes_back_to_torch(folder: Path) -> None:
    """Law: the proof holds for the threads it was made with, and is not used beyond."""
    before = torch.get_num_threads()
    model = load(folder)
    calls = []
    for module in model.modules():
        if isinstance(module, OffloadedExperts):
            kernel = module._math.row_kernel

            def counted(*args: Any, product: Any = kernel.up) -> torch.Tensor:
                calls.append(1)
                return product(*args)

            object.__setattr__(kernel, "up", counted)
    tokens = torch.randint(0, 300, (1, 4), generator=torch.Generator().manual_seed(0))
    step_logits(model, tokens)
    assert calls
    calls.clear()
    try:
        torch.set_num_threads(before + 1)
        step_logits(model, tokens)
    finally:
        torch.set_num_threads(before)
    assert not calls


def test_float32_is_torchs(folder: Path) -> None:
    """Law: the kernel is for bfloat16."""
    model = load(folder, dtype=torch.float32)
    assert not any(row_kernels(model))
    assert moe_runtime.handle(model).report()["settings"]["experts"] == "torch"
