"""The two trained checkpoints: small, in hub layout, really trained, the same when offloaded."""

import enum
import lzma
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import moe_runtime
from moe_runtime.cli.demo import CHECKPOINT
from moe_runtime.memory.checkpoint import Checkpoint
from tests.tiny_models import experts_modules

FOLDERS = {"mixtral": CHECKPOINT, "deepseek": Path(__file__).parent / "data" / "deepseek-stdlib"}
MAX_WEIGHT_BYTES = 10_000_000
WINDOW = 1024
# A module that neither model was trained on (their READMEs list what was held out).
HELD_OUT = Path(enum.__file__).read_bytes()[:40_000]


@pytest.fixture(scope="module", params=FOLDERS)
def folder(request: pytest.FixtureRequest) -> Path:
    return FOLDERS[request.param]


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")


@pytest.fixture(scope="module")
def windows(folder: Path) -> list[torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = HELD_OUT.decode()
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text, "a byte-level tokenizer loses nothing"
    return [torch.tensor([ids[i : i + WINDOW]]) for i in range(0, len(ids), WINDOW)]


def test_it_is_small_and_in_hub_layout(folder: Path) -> None:
    """Law: at most 10 MB, one tensor an expert and projection."""
    checkpoint = Checkpoint.open(folder)
    assert sum(tensor.num_bytes for tensor in checkpoint.values()) <= MAX_WEIGHT_BYTES
    expert_tensors = [name for name in checkpoint if ".experts." in name]
    config = AutoModelForCausalLM.from_pretrained(folder).config
    num_dense = getattr(config, "first_k_dense_replace", 0)
    num_layers = config.num_hidden_layers - num_dense
    assert len(expert_tensors) == num_layers * config.num_local_experts * 3


@torch.no_grad()
def test_it_beats_xz_on_a_module_it_never_saw(
    model: PreTrainedModel, windows: list[torch.Tensor]
) -> None:
    """Law: fewer bits than `xz -9e`, first tokens of windows counted as uniform."""
    nats = 0.0
    for ids in windows:
        logits = model(ids).logits[0, :-1].float()
        nats += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        nats += math.log(model.config.vocab_size)
    packed = lzma.compress(HELD_OUT, preset=9 | lzma.PRESET_EXTREME)
    assert nats / math.log(2) < 8 * len(packed)


@pytest.fixture
def uses(model: PreTrainedModel) -> Iterator[dict[str, torch.Tensor]]:
    """Experts module -> how often each expert was chosen while the test ran."""
    counts = {
        name: torch.zeros(module.num_experts, dtype=torch.long)
        for name, module in experts_modules(model).items()
    }

    def count(name: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            counts[name] += torch.bincount(inputs[1].flatten(), minlength=len(counts[name]))

        return hook

    hooks = [
        module.register_forward_pre_hook(count(name))
        for name, module in experts_modules(model).items()
    ]
    yield counts
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def test_no_expert_is_idle(
    model: PreTrainedModel, windows: list[torch.Tensor], uses: dict[str, torch.Tensor]
) -> None:
    """Law: balanced layer by layer, so that on one file, too, every expert has work."""
    for ids in windows:
        model(ids)
    for name, counts in uses.items():
        assert counts.min() > 0, f"{name}: {counts.tolist()}"


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_offloaded_equals_unmodified(
    folder: Path, windows: list[torch.Tensor], dtype: torch.dtype
) -> None:
    """Law: learnt routing changes nothing about equal bits, in prompts and in decoding."""
    unmodified = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, experts_implementation="eager"
    )
    model = moe_runtime.load(folder, expert_memory="40%", exact=True, dtype=dtype)
    ids = windows[0][:, :200]
    assert torch.equal(model(ids).logits, unmodified(ids).logits)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 24, "do_sample": False}
    assert torch.equal(model.generate(ids, **settings), unmodified.generate(ids, **settings))
