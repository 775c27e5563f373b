"""Laws of the handle: what would lose experts raises and harms nothing; all can be undone."""

import copy
import gc
import io
import pickle
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moe_runtime
from moe_runtime.errors import BudgetError, OffloadedExpertsError, UnsupportedModelError
from tests.tiny_models import load_unmodified, logits_of, prompt

Checkpoints = Callable[[str], Path]

pytestmark = pytest.mark.filterwarnings("ignore:.*expert slots are fewer")


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoints) -> nn.Module:
    """Shared by the tests that must leave it unharmed."""
    return moe_runtime.load(checkpoint("mixtral"), expert_memory="25%", exact=True)


@pytest.fixture(scope="module")
def expected(checkpoint: Checkpoints) -> torch.Tensor:
    return logits_of(load_unmodified(checkpoint("mixtral")), prompt())


REFUSED: dict[str, tuple[Callable[[Any, Path], object], str]] = {
    "state_dict": (lambda m, _: m.state_dict(), "would lack them"),
    "save_pretrained": (lambda m, p: m.save_pretrained(p), "would lack them"),
    "torch.save": (lambda m, p: torch.save(m, p / "model.pt"), "cannot be pickled"),
    "state_dict of a layer": (lambda m, _: m.model.layers[1].state_dict(), "would lack them"),
    "load_state_dict": (
        lambda m, _: m.load_state_dict(
            {name: torch.zeros_like(p) for name, p in m.named_parameters()}, strict=False
        ),
        "cannot take new weights",
    ),
    "deepcopy": (lambda m, _: copy.deepcopy(m), "cannot be copied"),
    "deepcopy of experts": (
        lambda m, _: copy.deepcopy(m.model.layers[0].mlp.experts), "cannot be copied",
    ),
    "pickle": (lambda m, _: pickle.dumps(m), "cannot be pickled"),
    "half": (lambda m, _: m.half(), "stay torch.float32 on cpu"),
    "bfloat16": (lambda m, _: m.bfloat16(), "stay torch.float32 on cpu"),
    "double": (lambda m, _: m.double(), "stay torch.float32 on cpu"),
    "to dtype": (lambda m, _: m.to(torch.float16), "dtype="),
    "half of the inner model": (lambda m, _: m.model.half(), "stay torch.float32 on cpu"),
    "half of a wrapper": (lambda m, _: nn.Sequential(m).half(), "stay torch.float32 on cpu"),
    "load into a layer": (
        lambda m, _: m.model.layers[0].load_state_dict(
            {"input_layernorm.weight": torch.zeros(64)}, strict=False
        ),
        "cannot take new weights",
    ),
    "to meta": (lambda m, _: m.to("meta"), "device_map="),
    "to_empty": (lambda m, _: m.to_empty(device="meta"), "stay torch.float32 on cpu"),
    "offload again": (lambda m, _: moe_runtime.offload(m), "offloaded already"),
    "parameter": (
        lambda m, _: m.model.layers[0].mlp.experts.gate_up_proj, "'gate_up_proj' is offloaded",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_remedy_and_harm_nothing(
    model: nn.Module, expected: torch.Tensor, tmp_path: Path, name: str
) -> None:
    """Law: what would lose experts raises with the remedy; the model stays as it was."""
    act, message = REFUSED[name]
    before = {key: (p.dtype, p.device, p.data_ptr()) for key, p in model.named_parameters()}
    error = AttributeError if name == "parameter" else OffloadedExpertsError
    with pytest.raises(error, match=message) as caught:
        act(model, tmp_path)
    assert "restore()" in str(caught.value)
    assert not list(tmp_path.glob("*.safetensors")), "a checkpoint without experts was written"
    after = {key: (p.dtype, p.device, p.data_ptr()) for key, p in model.named_parameters()}
    assert after == before
    assert torch.equal(logits_of(model, prompt()), expected)


@pytest.mark.parametrize(
    "act",
    [lambda m: m.to("cpu"), lambda m: m.float(), lambda m: m.to(torch.float32), lambda m: m.eval(),
     lambda m: m.requires_grad_(False), lambda m: m.apply(lambda module: None)],
    ids=["to cpu", "float", "to float32", "eval", "requires_grad_", "apply"],
)  # fmt: skip
def test_what_changes_nothing_works(
    model: nn.Module, expected: torch.Tensor, act: Callable[[nn.Module], nn.Module]
) -> None:
    """Law: moves and casts to where the model is already are allowed."""
    assert act(model) is model
    assert torch.equal(logits_of(model, prompt()), expected)


def test_training_is_refused(checkpoint: Checkpoints) -> None:
    """Law: a forward in training mode that needs gradients raises with the remedy."""
    model = moe_runtime.load(checkpoint("mixtral"), expert_memory="25%", exact=True)
    model.train()
    with pytest.raises(OffloadedExpertsError, match=r"for inference; call model\.eval\(\)"):
        model(input_ids=prompt())
    model.eval()
    model(input_ids=prompt())


def test_backward_is_refused(checkpoint: Checkpoints) -> None:
    """Law: with gradients on, an eval forward is right and its backward raises."""
    model = moe_runtime.load(checkpoint("mixtral"), expert_memory="25%", exact=True)
    logits = model(input_ids=prompt()).logits
    assert torch.equal(logits, logits_of(load_unmodified(checkpoint("mixtral")), prompt()))
    with pytest.raises(OffloadedExpertsError, match="no gradient flows through"):
        logits.sum().backward()


def threads_and_files() -> tuple[int, int]:
    """How many threads and open files this process has, once what was forgotten is gone."""
    gc.collect()
    time.sleep(0.05)  # threads of a pool that was collected end by themselves
    return threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("name", ["mixtral", "mixtral_bf16", "gpt_oss"])
def test_restore_makes_the_model_whole(checkpoint: Checkpoints, name: str) -> None:
    """Law: after restore() a loaded model is the unmodified one: names, bits, class, behaviour."""
    dtype = torch.bfloat16 if name.endswith("bf16") else torch.float32
    theirs = load_unmodified(checkpoint(name), dtype)
    ours = moe_runtime.load(checkpoint(name), expert_memory="20%", exact=True, dtype=dtype)
    logits_of(ours, prompt())
    threads = threading.active_count()
    handle = moe_runtime.handle(ours)
    handle.restore()
    handle.restore()
    assert threading.active_count() <= threads
    found, wanted = ours.state_dict(), theirs.state_dict()
    assert list(found) == list(wanted)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert {n: p.requires_grad for n, p in ours.named_parameters()} == {
        n: p.requires_grad for n, p in theirs.named_parameters()
    }
    assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]
    ours.config._experts_implementation = "eager"
    assert torch.equal(logits_of(ours, prompt()), logits_of(theirs, prompt()))
    copy.deepcopy(ours).half()
    with pytest.raises(UnsupportedModelError):
        moe_runtime.handle(ours)


def test_restored_model_saves(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """Law: a restored model saves a checkpoint that transformers reads as the first."""
    ours = moe_runtime.load(checkpoint("mixtral"), expert_memory="20%", exact=True)
    moe_runtime.handle(ours).restore()
    ours.save_pretrained(tmp_path)
    found, wanted = load_unmodified(tmp_path), load_unmodified(checkpoint("mixtral"))
    for (name, value), (key, expected) in zip(
        found.state_dict().items(), wanted.state_dict().items(), strict=True
    ):
        assert name == key
        assert torch.equal(value, expected)


def test_restore_without_memory_keeps_the_offload(
    checkpoint: Checkpoints, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: a restore that does not fit raises BudgetError and the model still runs."""
    from moe_runtime.integrations.transformers import handle as module

    model = moe_runtime.load(checkpoint("mixtral"), expert_memory="25%", exact=True)
    monkeypatch.setattr(module, "available_memory_bytes", lambda: 1000)
    with pytest.raises(BudgetError, match=r"restoring takes .* and 1000 B are free"):
        moe_runtime.handle(model).restore()
    assert torch.equal(logits_of(model, prompt()), expected)


def test_close_ends_the_model(checkpoint: Checkpoints) -> None:
    """Law: after close() no thread, file or slot is left, and a forward says why it cannot run."""
    before = threads_and_files()
    model = moe_runtime.load(checkpoint("mixtral"), expert_memory="25%", exact=True)
    logits_of(model, prompt())
    handle = moe_runtime.handle(model)
    assert threads_and_files() != before
    handle.close()
    handle.close()
    assert threads_and_files() == before
    with pytest.raises(OffloadedExpertsError, match=r"released by close\(\); load the model again"):
        model(input_ids=prompt())
    with pytest.raises(OffloadedExpertsError):
        handle.restore()


def test_leaving_the_context_closes_a_loaded_model(checkpoint: Checkpoints) -> None:
    """Law: the handle of a loaded model, left as a context, frees everything."""
    model = moe_runtime.load(checkpoint("mixtral"), expert_memory="25%", exact=True)
    with moe_runtime.handle(model) as handle:
        logits_of(model, prompt())
        assert handle.report()["cache"]["misses"] > 0
    with pytest.raises(OffloadedExpertsError):
        model(input_ids=prompt())


def test_dropping_the_model_frees_it(checkpoint: Checkpoints) -> None:
    """Law: a model that is simply forgotten leaves no thread and no open file."""
    before = threads_and_files()
    model = moe_runtime.load(checkpoint("mixtral"), expert_memory="25%", exact=True)
    logits_of(model, prompt())
    assert threads_and_files() != before
    del model
    assert threads_and_files() == before


def test_handle_is_found_through_wrappers(model: nn.Module) -> None:
    """Law: the handle is found from the model and from what wraps it; elsewhere it raises."""
    wrapper = nn.Sequential(nn.Identity(), model)
    assert moe_runtime.handle(wrapper) is moe_runtime.handle(model)
    with pytest.raises(UnsupportedModelError, match=r"Linear has no offloaded experts; use"):
        moe_runtime.handle(nn.Linear(2, 2))


def test_placement_is_one_line(model: nn.Module) -> None:
    """Law: the placement says in one line how many experts live where."""
    line = moe_runtime.handle(model).placement()
    assert "\n" not in line
    assert line.startswith("32 experts of 4 layers")
    assert "8 at a time" in line
    assert "on cpu" in line


def test_safetensors_save_model_is_refused(model: nn.Module, tmp_path: Path) -> None:
    """Law: other ways to write a checkpoint go through state_dict and raise as well."""
    from safetensors.torch import save_model

    with pytest.raises(OffloadedExpertsError):
        save_model(model, str(tmp_path / "model.safetensors"))
    with pytest.raises(OffloadedExpertsError):
        torch.save(model.state_dict(), io.BytesIO())
