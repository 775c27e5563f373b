"""Laws of a predictor beside a model whose experts travel through tiers of a fake accelerator."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import moe_runtime
from moe_runtime.foresight import Foresight
from moe_runtime.integrations.transformers import tiered_maths
from moe_runtime.integrations.transformers.foresee import attach
from moe_runtime.predictors.gate import gate_topk
from moe_runtime.predictors.live_gates import LiveGates
from tests.adversaries import (
    Adversary,
    Array,
    OpenGate,
    all_nan,
    certain_of_all,
    inverted,
    mostly_nonsense,
    raising,
    random_guesses,
)
from tests.fake_streams import FakeMachine
from tests.fake_tiers import put_tiers_below
from tests.integrations.test_foresee import FINGERPRINT, NUM_NEW, listen, tokens
from tests.tiny_checkpoint import NUM_LAYERS, TOP_K, save_mixtral

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*expert slots are fewer"),
    pytest.mark.filterwarnings("ignore:host_memory and miss have no effect"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixtral(tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    """Tiers below the CPU, where torch computes each expert."""
    monkeypatch.setattr(tiered_maths, "find_grouped", lambda *_: "the test says no")
    return put_tiers_below(monkeypatch)


@contextmanager
def loaded(folder: Path, **arguments: Any) -> Iterator[PreTrainedModel]:
    """Two fifths of the experts on the device and three on the host, poisoned until they come."""
    model = moe_runtime.load(
        folder,
        expert_memory=0.4,
        host_memory="60%",
        miss="copy",
        warm_start=False,
        **arguments,
    )
    owner = moe_runtime.handle(model)
    owner.engine._poison = True
    try:
        yield model
    finally:
        owner.close()


@pytest.mark.parametrize("policy", ["lru", "plec"])
@pytest.mark.parametrize(
    "say", [random_guesses, all_nan, mostly_nonsense, certain_of_all], ids=lambda f: f.__name__
)
def test_no_predictor_changes_a_token(
    folder: Path, machine: FakeMachine, say: Callable[[tuple[int, ...]], Array], policy: str
) -> None:
    """Law: guesses, NaN and nonsense give the tokens of no predictor, in poisoned slots."""
    with loaded(folder, policy=policy) as model:
        expected = tokens(model)
    with loaded(folder, policy=policy) as model:
        listen(model, say)
        assert tokens(model) == expected
        assert tokens(model) == expected
        report = moe_runtime.handle(model).report()["prediction"]
    if say is all_nan and policy == "lru":
        assert report["reads_ahead"] == 0
    if say in (random_guesses, certain_of_all):
        assert report["reads_ahead"] > report["copies_ahead"] > NUM_NEW
    assert machine.is_idle


def test_an_inverted_predictor_changes_no_token(folder: Path) -> None:
    """Law: a predictor that is sure of whom nobody uses is wrong at no cost but time."""
    with loaded(folder) as model:
        expected = tokens(model)
        truth, _ = listen(model, all_nan)
        tokens(model)
    with loaded(folder) as model:
        listen(model, inverted(truth))
        assert tokens(model) == expected
        report = moe_runtime.handle(model).report()["prediction"]
    assert report["reads_ahead"] > NUM_NEW
    assert report["wasted_bytes"] > 0


def test_a_failing_predictor_is_left_out(folder: Path) -> None:
    """Law: a predictor that raises is never asked again, and harms nobody."""
    with loaded(folder) as model:
        expected = tokens(model)
        adversary, gate = listen(model, raising)
        assert tokens(model) == expected
    assert "predictor adversary failed" in gate.failure
    assert len(adversary.heard) == 1


def test_a_predictor_hears_what_happens_when_it_happens(folder: Path) -> None:
    """Law: each layer's router input and choice is heard once, in the order of layers."""
    with loaded(folder, predictor="gate_lookahead") as model:
        foresight = moe_runtime.handle(model).foresight
        assert foresight is not None
        gates = foresight.predictor
        assert isinstance(gates, LiveGates)
    with loaded(folder) as model:
        adversary, gate = listen(model, all_nan)
        tokens(model)
    observed = [heard for heard in adversary.heard if heard[0] == "observe"]
    assert [layer for _, layer, _, _ in observed] == [*range(NUM_LAYERS)] * NUM_NEW
    for _, layer, topk, hidden in observed:
        assert np.array_equal(np.sort(gate_topk(gates.gates[layer], hidden, TOP_K)), np.sort(topk))
    assert all(facts.num_visits == NUM_LAYERS for facts in gate.facts)
    assert any(facts.read_seconds for facts in gate.facts)
    assert all(facts.stall_seconds >= 0.0 <= facts.idle_seconds for facts in gate.facts)


def test_one_who_knows_gains_hits(folder: Path) -> None:
    """Law: told the truth, layers find on the device what they would have waited for."""
    ids, hits = torch.tensor([[5, 9, 33, 70]]), {}
    with loaded(folder) as model:
        truth, _ = listen(model, all_nan)
        tokens(model, ids)
        hits[False] = moe_runtime.handle(model).report()["cache"]["hits"]
    steps: list[dict[int, Array]] = []
    for heard in truth.heard:
        if heard[0] == "begin":
            steps.append({})
        else:
            steps[-1][heard[1]] = heard[2]
    position = {"step": -1, "layer": -1}

    def know(shape: tuple[int, ...]) -> Array:
        said = np.zeros(shape)
        routed = steps[position["step"]]
        for place, layer in enumerate(range(position["layer"] + 1, NUM_LAYERS)):
            if place < shape[1]:
                said[:, place, np.unique(routed[layer])] = 1.0
        return said

    class Knowing(Adversary):
        def begin(self, rows: Any) -> Any:
            position["step"] += 1
            position["layer"] = -1
            return super().begin(rows)

        def observe(self, layer: int, topk: Array, hidden: Array | None) -> Any:
            position["layer"] = layer
            forecast = super().observe(layer, topk, hidden)
            return type(forecast)(
                first_layer=forecast.first_layer, probability=forecast.probability
            )

    with loaded(folder) as model:
        owner = moe_runtime.handle(model)
        attach(model, owner, Foresight(owner.ahead, Knowing(FINGERPRINT, know), OpenGate()))
        tokens(model, ids)
        report = owner.report()
        hits[True] = report["cache"]["hits"]
    assert hits[True] > hits[False]
    assert report["prediction"]["used"] > 0


def test_the_models_own_routers(folder: Path) -> None:
    """Law: 'auto' takes the gates of the model, and the report says what became of it."""
    with loaded(folder, predictor="auto") as model:
        tokens(model)
        prediction = moe_runtime.handle(model).report()["prediction"]
    assert prediction["predictor"] == "gate_lookahead"
    assert prediction["mode"] in ("trial", "on", "off")
    assert prediction["read_ms"] > 0.0
