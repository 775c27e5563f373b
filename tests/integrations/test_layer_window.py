"""Dense layers that do not fit are read as they run, and compute what they would in memory."""

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import moe_runtime
from moe_runtime.errors import BudgetError, ExpertReadError
from moe_runtime.integrations.transformers import load as loading
from tests.tiny_models import tiny_model

# Every layer alike; a first layer that is dense, and latent attention; biases and sinks; layers of
# attention and of convolutions, whose weights differ in shape.
FAMILIES = ["mixtral", "deepseek_v3", "gpt_oss", "lfm2_moe"]
TOKENS = torch.randint(8, 160, (2, 11), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def find(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            tiny_model(name).save_pretrained(made[name])
        return made[name]

    return find


def load(folder: Path, **settings: Any) -> PreTrainedModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few slots
        return moe_runtime.load(
            folder, **{"expert_memory": "50%", "warm_start": False, "exact": True} | settings
        )


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def floor_bytes(folder: Path) -> int:
    """What the refusal of one byte names."""
    with pytest.raises(BudgetError, match=r"is below the floor of .* set dense_memory=") as caught:
        load(folder, dense_memory=1)
    return int(str(caught.value).split("dense_memory=")[1].split()[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_smallest_budget_gives_the_bits_of_all_layers_in_memory(
    name: str, folder: Callable[[str], Path]
) -> None:
    """Law: with the budget that the refusal names, and one byte less is refused."""
    expected = logits(load(folder(name)))
    least = floor_bytes(folder(name))
    model = load(folder(name), dense_memory=least)
    owner = moe_runtime.handle(model)
    memory = owner.report()["memory"]
    assert memory["dense_used_bytes"] <= least < memory["dense_bytes"]
    assert memory["dense_window"]["layers_in_memory"] == 2
    assert owner.placement().endswith("at a time")
    for _ in range(3):
        assert torch.equal(logits(model), expected)
    owner.close()
    with pytest.raises(BudgetError, match=f"dense_memory={least} "):
        load(folder(name), dense_memory=least - 1)


def test_each_layer_is_read_once_a_pass_at_most(folder: Callable[[str], Path]) -> None:
    """Law: with room for two of L layers all are, and with room for W at most L - W + 2."""
    least = floor_bytes(folder("mixtral"))
    for more in (0, 1):
        model = load(folder("mixtral"), dense_memory=least)
        layer_bytes = moe_runtime.handle(model).report()["memory"]["dense_window"]["layer_bytes"]
        moe_runtime.handle(model).close()
        model = load(folder("mixtral"), dense_memory=least + more * layer_bytes)
        window = moe_runtime.handle(model)._window
        assert window is not None
        logits(model)
        cache, ledger = window.engine.cache, window.engine.ledger
        reads = []
        for _ in range(3):
            before = sum(c.misses for c in cache.counts.values()) + ledger.counts.started
            logits(model)
            after = sum(c.misses for c in cache.counts.values()) + ledger.counts.started
            reads.append(after - before)
        num_layers = len(window.plan.modules)
        assert max(reads) <= num_layers - more
        assert more or reads == [num_layers] * 3
        moe_runtime.handle(model).close()


def test_weights_are_in_modules_only_while_they_run(folder: Callable[[str], Path]) -> None:
    model = load(folder("mixtral"), dense_memory=floor_bytes(folder("mixtral")))
    seen = []
    projections = [layer.self_attn.q_proj for layer in model.model.layers]
    for projection in projections:
        projection.register_forward_pre_hook(
            lambda *_: seen.append([one.weight.is_meta for one in projections].count(False))
        )
    logits(model)
    assert seen == [1] * len(projections)
    assert all(projection.weight.is_meta for projection in projections)
    moe_runtime.handle(model).close()


def test_restore_brings_dense_layers_back(folder: Callable[[str], Path]) -> None:
    expected = logits(load(folder("mixtral")))
    model = load(folder("mixtral"), dense_memory=floor_bytes(folder("mixtral")))
    moe_runtime.handle(model).restore()
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(logits(model), expected)


def test_a_damaged_file_is_reported_by_name(folder: Callable[[str], Path], tmp_path: Path) -> None:
    own = tmp_path / "model"
    own.mkdir()
    for file in folder("mixtral").iterdir():
        (own / file.name).write_bytes(file.read_bytes())
    model = load(own, dense_memory=floor_bytes(own))
    file = next(own.glob("*.safetensors"))
    with file.open("r+b") as stream:
        stream.truncate(random.Random(0).randrange(file.stat().st_size // 2))
    with pytest.raises(ExpertReadError, match=file.name):
        logits(model)
    moe_runtime.handle(model).close()


def test_layers_that_do_not_fit_what_is_free_are_streamed_unasked(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: under 'auto' all are in memory where they fit, and else as many as fit."""
    least = floor_bytes(folder("mixtral"))
    assert moe_runtime.handle(load(folder("mixtral"))).report()["memory"]["dense_window"] is None
    monkeypatch.setattr(loading, "dense_room_bytes", lambda *_: least)
    model = load(folder("mixtral"))
    assert moe_runtime.handle(model).report()["memory"]["dense_used_bytes"] <= least
    moe_runtime.handle(model).close()


def test_what_it_does_not_go_with_is_refused(folder: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="is for one process on the CPU without a predictor"):
        load(folder("mixtral"), dense_memory="50%", exact=False, predictor="auto")
    with pytest.raises(BudgetError, match="dense_memory 'much' is not a size"):
        load(folder("mixtral"), dense_memory="much")
