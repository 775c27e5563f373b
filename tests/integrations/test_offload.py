"""Laws of offload(): a model in memory runs the same from disk, and comes back as it was."""

import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import moe_runtime
from moe_runtime.errors import BudgetError, OffloadedExpertsError, UnsupportedModelError
from tests.tiny_models import logits_of, prompt, tiny_model

NUM_EXPERTS, MODEL_DIM, FFN_DIM, TOP_K = 8, 32, 24, 2

pytestmark = pytest.mark.filterwarnings("ignore:.*expert slots are fewer")


@pytest.fixture(autouse=True)
def spills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder of one test; nothing may be left there."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


class RemoteExpert(nn.Module):
    """One expert as Mixtral's code of transformers 4 had it."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Linear(MODEL_DIM, FFN_DIM, bias=False)
        self.w2 = nn.Linear(FFN_DIM, MODEL_DIM, bias=True)
        self.w3 = nn.Linear(MODEL_DIM, FFN_DIM, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.w2(self.act_fn(self.w1(hidden)) * self.w3(hidden))
        return output


class RemoteBlock(nn.Module):
    """A sparse block as remote code writes it: a ModuleList of experts and a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.top_k = TOP_K
        self.gate = nn.Linear(MODEL_DIM, NUM_EXPERTS, bias=False)
        self.experts = nn.ModuleList(RemoteExpert() for _ in range(NUM_EXPERTS))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        shape = hidden.shape
        hidden = hidden.reshape(-1, MODEL_DIM)
        scores = functional.softmax(self.gate(hidden), dim=-1, dtype=torch.float)
        weights, selected = torch.topk(scores, self.top_k, dim=-1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(hidden.dtype)
        output = torch.zeros_like(hidden)
        mask = functional.one_hot(selected, num_classes=NUM_EXPERTS).permute(2, 1, 0)
        for expert, layer in enumerate(self.experts):
            position, token = torch.where(mask[expert])
            if len(token):
                output.index_add_(0, token, layer(hidden[token]) * weights[token, position, None])
        return output.reshape(shape)


class RemoteModel(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(RemoteBlock() for _ in range(3))
        self.norm = nn.LayerNorm(MODEL_DIM)
        self.to(dtype).eval()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden = hidden + block(self.norm(hidden))
        return hidden


def snapshot(module: nn.Module) -> dict[str, Any]:
    """Everything that restore() must bring back."""
    return {
        "names": list(module.state_dict()),
        "values": {name: value.clone() for name, value in module.state_dict().items()},
        "requires_grad": {name: p.requires_grad for name, p in module.named_parameters()},
        "classes": [type(m) for m in module.modules()],
        "attributes": [sorted(m.__dict__) for m in module.modules()],
        "training": [m.training for m in module.modules()],
    }


def assert_restored(module: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(module)
    values, wanted = after.pop("values"), before["values"]
    assert after == {key: value for key, value in before.items() if key != "values"}
    for name, value in wanted.items():
        assert value.dtype == values[name].dtype
        assert torch.equal(value, values[name]), name


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_in_memory(model_type: str, dtype: torch.dtype, spills: Path) -> None:
    """Law: an offloaded model gives the same logits and tokens, and restore() undoes everything."""
    model = tiny_model(model_type).to(dtype)
    model.model.layers[0].requires_grad_(False)
    before, input_ids = snapshot(model), prompt(2, 40)
    expected = logits_of(model, input_ids)
    settings = {"attention_mask": torch.ones_like(input_ids), "max_new_tokens": 5}
    ids = model.generate(input_ids, do_sample=False, **settings)
    handle = moe_runtime.offload(model, expert_memory=0.1, exact=True)
    assert handle is moe_runtime.handle(model)
    assert len(list(spills.iterdir())) == 1
    assert sum(p.numel() for n, p in model.named_parameters() if "experts" in n) == 0
    assert torch.equal(logits_of(model, input_ids), expected)
    assert torch.equal(model.generate(input_ids, do_sample=False, **settings), ids)
    handle.restore()
    handle.restore()
    assert list(spills.iterdir()) == []
    assert_restored(model, before)
    assert torch.equal(logits_of(model, input_ids), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_module_lists(dtype: torch.dtype, policy: str, spills: Path) -> None:
    """Law: ModuleLists of experts, as in remote code, run from disk bit for bit and come back."""
    model = RemoteModel(dtype)
    model.blocks[1].experts.requires_grad_(False)
    before = snapshot(model)
    inputs = [torch.randn(2, n, MODEL_DIM).to(dtype) for n in (1, 30, 1, 7)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
        with moe_runtime.offload(model, expert_memory="20%", exact=True, policy=policy) as handle:
            assert handle.budget.num_slots == 24 // 5
            assert all(p.is_meta for n, p in model.named_parameters() if ".experts." in n)
            for x, y in zip(inputs, expected, strict=True):
                assert torch.equal(model(x), y)
                assert torch.equal(model(hidden=x), y)
            assert handle.report()["settings"]["experts"] == "module list"
    assert list(spills.iterdir()) == []
    assert_restored(model, before)


def test_a_module_list_itself(spills: Path) -> None:
    """Law: the ModuleList alone may be given, whatever calls it."""
    torch.manual_seed(0)
    block = RemoteBlock().eval()
    before, x = snapshot(block), torch.randn(1, 9, MODEL_DIM)
    with torch.no_grad():
        expected = block(x)
        with moe_runtime.offload(block.experts, expert_memory=0.25, exact=True):
            assert torch.equal(block(x), expected)
            assert len(moe_runtime.handle(block).report()["cache"]["per_layer"]) == 1
    assert_restored(block, before)


def test_one_block_of_a_model() -> None:
    """Law: a module that contains experts may be offloaded alone; the others stay as they are."""
    model = RemoteModel()
    x = torch.randn(1, 9, MODEL_DIM)
    with torch.no_grad():
        expected = model(x)
        with moe_runtime.offload(model.blocks[1], expert_memory=0.25, exact=True):
            assert torch.equal(model(x), expected)
            assert not any(p.is_meta for p in model.blocks[0].parameters())
        assert torch.equal(model(x), expected)


def test_lists_of_layers_are_not_experts() -> None:
    """Law: a ModuleList given itself whose modules hold experts is searched, not taken for one."""
    model = tiny_model("mixtral")
    before, expected = snapshot(model), logits_of(model, prompt())
    with moe_runtime.offload(model.model.layers, expert_memory=0.1, exact=True) as handle:
        assert [layer["name"] for layer in handle.report()["cache"]["per_layer"]] == [
            f"{layer}.mlp.experts" for layer in range(4)
        ]
        assert torch.equal(logits_of(model, prompt()), expected)
    assert_restored(model, before)
    remote = RemoteModel()
    x = torch.randn(1, 9, MODEL_DIM)
    with torch.no_grad():
        output = remote(x)
        with moe_runtime.offload(remote.blocks, expert_memory=0.25, exact=True) as handle:
            assert len(handle.report()["cache"]["per_layer"]) == 3
            assert torch.equal(remote(x), output)


def test_gradients_of_module_lists() -> None:
    """Law: experts of a ModuleList refuse training and backward like the others."""
    model = RemoteModel()
    x = torch.randn(1, 9, MODEL_DIM)
    expected = model(x)
    with moe_runtime.offload(model, expert_memory=0.25, exact=True):
        found = model(x)
        assert torch.equal(found, expected)
        with pytest.raises(OffloadedExpertsError, match="no gradient flows"):
            found.sum().backward()
        model.train()
        with pytest.raises(OffloadedExpertsError, match="for inference"):
            model(x)
        model.eval()
    model(x).sum().backward()
    assert model.blocks[0].experts[0].w1.weight.grad is not None


REFUSED: dict[str, Callable[[nn.Module], object]] = {
    "state_dict": lambda m: m.state_dict(),
    "half": lambda m: m.half(),
    "meta": lambda m: m.to("meta"),
    "load_state_dict": lambda m: m.load_state_dict(
        {"norm.bias": torch.ones(MODEL_DIM)}, strict=False
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_harm_nothing(name: str) -> None:
    """Law: what would lose experts of a ModuleList raises, and the model runs as before."""
    model = RemoteModel()
    x = torch.randn(1, 9, MODEL_DIM)
    with torch.no_grad():
        expected = model(x)
        with moe_runtime.offload(model, expert_memory=0.25, exact=True):
            with pytest.raises(OffloadedExpertsError, match=r"restore\(\)"):
                REFUSED[name](model)
            assert torch.equal(model(x), expected)
        assert torch.equal(model(x), expected)


def test_error_inside_an_expert_leaves_it_clean() -> None:
    """Law: an exception in an expert's forward leaves no weights bound and the next call right."""
    model = RemoteModel()
    x = torch.randn(1, 9, MODEL_DIM)
    with torch.no_grad():
        expected = model(x)
        with moe_runtime.offload(model, expert_memory=0.25, exact=True):
            with pytest.raises(RuntimeError, match="mat1 and mat2"):
                model.blocks[0].experts[0](torch.randn(1, MODEL_DIM + 1))
            assert all(p.is_meta for n, p in model.named_parameters() if ".experts." in n)
            assert torch.equal(model(x), expected)


def test_close_removes_the_spill(spills: Path) -> None:
    """Law: close() removes what was written; the model then says that its experts are gone."""
    model = tiny_model("mixtral")
    handle = moe_runtime.offload(model, expert_memory=0.25, exact=True)
    handle.close()
    handle.close()
    assert list(spills.iterdir()) == []
    with pytest.raises(OffloadedExpertsError, match="released by close"):
        logits_of(model, prompt())


def test_forgotten_model_leaves_no_spill(spills: Path) -> None:
    """Law: a model that is dropped without close() takes what was written with it."""
    model = tiny_model("mixtral")
    moe_runtime.offload(model, expert_memory=0.25, exact=True)
    logits_of(model, prompt())
    assert list(spills.iterdir()) != []
    del model
    gc.collect()
    assert list(spills.iterdir()) == []


def test_ended_program_leaves_no_spill(spills: Path) -> None:
    """Law: a program that ends without close() leaves no file and does not hang."""
    program = (
        "import moe_runtime; from tests.tiny_models import *; model = tiny_model('mixtral');"
        "handle = moe_runtime.offload(model, 0.25); logits_of(model, prompt()); print('ran')"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env=os.environ | {"TMPDIR": str(spills), "PYTHONPATH": str(Path.cwd())},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "ran\n"), done.stderr
    assert list(spills.iterdir()) == []


def test_close_inside_the_context(spills: Path) -> None:
    """Law: leaving the context of a handle that was closed inside raises nothing."""
    with moe_runtime.offload(tiny_model("mixtral"), expert_memory=0.25, exact=True) as handle:
        handle.close()
    assert list(spills.iterdir()) == []


def test_error_inside_the_context_restores(spills: Path) -> None:
    """Law: an exception in the `with` body reaches the user, and the model comes back."""
    model = tiny_model("mixtral")
    before = snapshot(model)
    with (
        pytest.raises(ZeroDivisionError),
        moe_runtime.offload(model, expert_memory=0.25, exact=True),
    ):
        raise ZeroDivisionError
    assert_restored(model, before)
    assert list(spills.iterdir()) == []


def test_offload_folder(tmp_path: Path, spills: Path) -> None:
    """Law: the experts are written below the folder that was asked for, and removed from there."""
    folder = tmp_path / "mine"
    folder.mkdir()
    with moe_runtime.offload(
        tiny_model("mixtral"), expert_memory=0.25, exact=True, offload_folder=folder
    ):
        assert len(list(folder.glob("*/*.safetensors"))) == 4
        assert list(spills.iterdir()) == []
    assert list(folder.iterdir()) == []


def disk_full(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_runtime.integrations.transformers import offload as module

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", fail)


def test_below_the_floor(spills: Path) -> None:
    """Law: too little memory raises BudgetError with the floor, changes nothing, leaves no file."""
    model = tiny_model("mixtral")
    before = snapshot(model)
    with pytest.raises(BudgetError, match=r"floor of .*set expert_memory=\d+"):
        moe_runtime.offload(model, expert_memory="1KiB", exact=True)
    assert list(spills.iterdir()) == []
    assert_restored(model, before)


def test_full_disk(spills: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: if the experts cannot be written, the model stays whole and no file is left."""
    model = tiny_model("mixtral")
    before = snapshot(model)
    disk_full(monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        moe_runtime.offload(model, expert_memory=0.25, exact=True)
    assert list(spills.iterdir()) == []
    assert_restored(model, before)


def test_nothing_to_offload(spills: Path) -> None:
    """Law: a module without experts raises UnsupportedModelError and leaves no file."""
    with pytest.raises(UnsupportedModelError, match="Linear holds no experts"):
        moe_runtime.offload(nn.Linear(4, 4))
    assert list(spills.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_unsupported_dtype(dtype: torch.dtype, spills: Path) -> None:
    """Law: experts in a dtype that cannot be offloaded raise and are named."""
    model = RemoteModel()
    for expert in model.blocks[0].experts:
        expert.w1.weight = nn.Parameter(torch.zeros(3, 3, dtype=dtype), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"blocks\.0\.experts\.w1\.weight is torch"):
        moe_runtime.offload(model)
    assert list(spills.iterdir()) == []


def test_experts_that_share_memory(spills: Path) -> None:
    """Law: experts that are slices of one tensor, as fused remote code keeps them, offload too."""
    model = RemoteModel()
    for block in model.blocks:
        fused = torch.randn(NUM_EXPERTS, FFN_DIM, MODEL_DIM)
        for expert, values in zip(block.experts, fused, strict=True):
            expert.w1.weight = nn.Parameter(values)
    x = torch.randn(1, 9, MODEL_DIM)
    with torch.no_grad():
        expected = model(x)
        with moe_runtime.offload(model, expert_memory=0.25, exact=True):
            assert torch.equal(model(x), expected)
        assert torch.equal(model(x), expected)


def test_two_offloads_share_nothing() -> None:
    """Law: two models offloaded at once, used in turn, do not disturb each other."""
    models = [tiny_model("mixtral", seed) for seed in (1, 2)]
    expected = [logits_of(model, prompt()) for model in models]
    handles = [moe_runtime.offload(model, expert_memory=0.1, exact=True) for model in models]
    for _ in range(2):
        for model, logits in zip(models, expected, strict=True):
            assert torch.equal(logits_of(model, prompt()), logits)
    handles[0].restore()
    assert torch.equal(logits_of(models[1], prompt()), expected[1])
    handles[1].restore()


class TwoOutputs(nn.Module):
    """An expert that returns its output and something that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, str]:
        return self.project(x), "note"


def test_an_expert_that_returns_a_tuple_does_not_lose_gradients_silently() -> None:
    """Law: backward through offloaded experts raises, whatever shape their output has."""
    experts = nn.ModuleList(TwoOutputs() for _ in range(3)).eval()
    with moe_runtime.offload(experts, expert_memory=0.5, exact=True):
        output, note = experts[1](torch.ones(2, 8, requires_grad=True))
        assert note == "note"
        with pytest.raises(OffloadedExpertsError, match="no gradient"):
            output.sum().backward()
