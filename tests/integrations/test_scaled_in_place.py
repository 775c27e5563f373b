"""Experts of quantised checkpoints are computed from the bytes that slots hold of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import moe_runtime
from moe_runtime.integrations.transformers.fast import find_gate
from moe_runtime.integrations.transformers.proof import expert_math
from moe_runtime.kernels.cpu.experts import CpuExperts
from moe_runtime.kernels.cpu.operation import ClampedGate
from moe_runtime.layer import Accumulator
from tests.quantised_checkpoints import load_dequantised, resave, save_fp8, save_mxfp4, tensors_of
from tests.tiny_models import experts_modules, logits_of, prompt, tiny_model

BF16, F32 = torch.bfloat16, torch.float32
MAKERS: dict[str, Callable[[Path], Path]] = {"fp8": save_fp8, "mxfp4": save_mxfp4}
NUM_EXPERTS = 8
# Of the distance from float32: rounding less must not be further off than eager, give or take.
MOST_RATIO = 1.1

pytestmark = [
    pytest.mark.skipif(CpuExperts.load(BF16) is None, reason=CpuExperts.status()),
    pytest.mark.filterwarnings("ignore:.*expert slots are fewer"),
]


@pytest.fixture(scope="module", params=MAKERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MAKERS[request.param](tmp_path_factory.mktemp(request.param) / "model")


def load(path: Path, **settings: object) -> PreTrainedModel:
    return moe_runtime.load(path, **{"expert_memory": "35%", "warm_start": False} | settings)


def outputs_of(model: PreTrainedModel) -> torch.Tensor:
    """Logits at 240 positions of prompts so short that no expert has many tokens."""
    return torch.cat([logits_of(model, prompt(1, 8, seed=seed))[0].float() for seed in range(30)])


def test_bfloat16_takes_no_room_to_dequantise(folder: Path) -> None:
    """Law: a kernel computes each layer, and all of the budget is slots; `exact` keeps room."""
    handle = moe_runtime.handle(load(folder))
    assert handle.report()["settings"]["experts"].startswith(f"{CpuExperts.status()}, from")
    assert handle.budget.kind.room_bytes == 0
    assert handle.engine.slots.max_views == handle.budget.num_slots
    for settings in ({"exact": True}, {"dtype": F32}):
        assert moe_runtime.handle(load(folder, **settings)).budget.kind.room_bytes > 0


def test_parity_in_bfloat16(folder: Path) -> None:
    """Law: logits are no further from a float32 run than transformers' own eager ones are."""
    expected = outputs_of(load_dequantised(folder, F32))
    eager = (outputs_of(load_dequantised(folder, BF16)) - expected).norm()
    model = load(folder)
    assert (outputs_of(model) - expected).norm() <= MOST_RATIO * eager
    assert moe_runtime.handle(model).report()["cache"]["misses"] > 3 * NUM_EXPERTS


def test_outputs_do_not_depend_on_the_budget(folder: Path) -> None:
    """Law: what was cached, and what was read again into a slot, changes no bit."""
    few, all_of_them = load(folder), load(folder, expert_memory="100%")
    assert torch.equal(outputs_of(few), outputs_of(all_of_them))
    for num_tokens in (60, 3):  # many tokens an expert are dequantised, few beside them are not
        ids = prompt(2, num_tokens)
        assert torch.equal(logits_of(few, ids), logits_of(all_of_them, ids))


def test_scales_of_another_dtype_are_dequantised(tmp_path: Path) -> None:
    """Law: the kernel knows scales in float32; others take the way through room for one expert."""
    path = save_fp8(tmp_path / "model")
    tensors = tensors_of(path)
    for name in [n for n in tensors if n.endswith("_scale_inv")]:
        tensors[name] = tensors[name].bfloat16()
    resave(path, tensors)
    model = load(path)
    assert moe_runtime.handle(model).budget.kind.room_bytes > 0
    assert logits_of(model, prompt()).isfinite().all()


def test_the_gate_of_gpt_oss_is_the_kernels() -> None:
    """Law: alpha and limit are the module's, and gate and up take turns."""
    module: Any = next(iter(experts_modules(tiny_model("gpt_oss")).values()))
    math = expert_math(module, Accumulator.FLOAT32)
    assert math is not None
    assert find_gate(module, math) == (
        ClampedGate(alpha=module.alpha, limit=module.limit),
        True,
    )
