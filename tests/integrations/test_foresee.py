"""Laws of a predictor beside a running model: it changes no token, and cannot break anything."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import moe_runtime
from moe_runtime.errors import PredictorError
from moe_runtime.foresight import Foresight
from moe_runtime.integrations.transformers.foresee import attach
from moe_runtime.predictors.frequency import Frequency
from moe_runtime.predictors.gate import gate_topk
from moe_runtime.predictors.live_gates import LiveGates
from moe_runtime.predictors.predictor import Fingerprint, ModelFacts
from moe_runtime.predictors.store import save_predictor
from moe_runtime.trace import Trace
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
    wrong_shape,
)
from tests.tiny_checkpoint import NUM_EXPERTS, NUM_LAYERS, TOP_K, save_mixtral

FINGERPRINT = Fingerprint(
    model="unknown", num_layers=NUM_LAYERS, num_experts=NUM_EXPERTS, top_k=TOP_K
)
PROMPT = torch.tensor([[5, 9, 33, 70]])
NUM_NEW = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixtral(tmp_path_factory.mktemp("mixtral"))


@contextmanager
def loaded(folder: Path, **arguments: Any) -> Iterator[PreTrainedModel]:
    """In two fifths of the memory, with slots that are NaN until they are read."""
    model = moe_runtime.load(folder, expert_memory=0.4, warm_start=False, **arguments)
    owner = moe_runtime.handle(model)
    owner.engine._poison = True
    try:
        yield model
    finally:
        owner.close()


def tokens(model: PreTrainedModel, ids: torch.Tensor = PROMPT) -> list[int]:
    found: Any = model.generate(  # type: ignore[operator]
        ids, max_new_tokens=NUM_NEW, do_sample=False, eos_token_id=None
    )
    return found[0].tolist()  # type: ignore[no-any-return]


def listen(
    model: PreTrainedModel, say: Callable[[tuple[int, ...]], Array]
) -> tuple[Adversary, OpenGate]:
    """Let a predictor that says this speak, and be believed."""
    owner, gate = moe_runtime.handle(model), OpenGate()
    adversary = Adversary(FINGERPRINT, say)
    attach(model, owner, Foresight(owner.ahead, adversary, gate))
    return adversary, gate


@pytest.mark.parametrize("policy", ["lru", "plec"])
@pytest.mark.parametrize(
    "say", [random_guesses, all_nan, mostly_nonsense, certain_of_all], ids=lambda f: f.__name__
)
def test_no_predictor_changes_a_token(
    folder: Path, say: Callable[[tuple[int, ...]], Array], policy: str
) -> None:
    """Law: guesses, NaN and nonsense give the tokens of no predictor, in poisoned slots."""
    with loaded(folder, policy=policy) as model:
        expected = tokens(model)
    with loaded(folder, policy=policy) as model:
        listen(model, say)
        assert tokens(model) == expected
        assert tokens(model) == expected
        started = moe_runtime.handle(model).engine.ledger.counts.started
    if say is all_nan and policy == "lru":
        assert started == 0
    if say in (random_guesses, certain_of_all):
        assert started > NUM_NEW


def test_an_inverted_predictor_changes_no_token(folder: Path) -> None:
    """Law: a predictor that is sure of whom nobody uses is wrong at no cost but time."""
    with loaded(folder) as model:
        expected = tokens(model)
        truth, _ = listen(model, all_nan)
        tokens(model)
    with loaded(folder) as model:
        listen(model, inverted(truth))
        assert tokens(model) == expected
        assert moe_runtime.handle(model).engine.ledger.counts.started > NUM_NEW


@pytest.mark.parametrize("say", [raising, wrong_shape], ids=lambda f: f.__name__)
def test_a_failing_predictor_is_left_out(
    folder: Path, say: Callable[[tuple[int, ...]], Array], caplog: pytest.LogCaptureFixture
) -> None:
    """Law: a predictor that raises is named in one warning, never asked again, and harms nobody."""
    with loaded(folder) as model:
        expected = tokens(model)
        adversary, gate = listen(model, say)
        with caplog.at_level(logging.WARNING, "moe_runtime"):
            assert tokens(model) == expected
        assert "predictor adversary failed" in gate.failure
        assert len([r for r in caplog.records if "reading ahead is off" in r.message]) == 1
        assert len(adversary.heard) == 1


def test_a_predictor_hears_what_happens_when_it_happens(folder: Path) -> None:
    """Law: token ids before the first layer; each layer's router input and choice; no later."""
    with loaded(folder) as model:
        adversary, _ = listen(model, all_nan)
        written = tokens(model)
        gates = _live_gates(folder)
    steps: list[list[tuple[Any, ...]]] = []
    for heard in adversary.heard:
        if heard[0] == "begin":
            steps.append([])
        steps[-1].append(heard)
    assert len(steps) == NUM_NEW
    assert steps[0][0][1:] == (PROMPT[0].tolist(), [0, 1, 2, 3])
    for number, step in enumerate(steps[1:]):
        assert step[0][1:] == ([written[4 + number]], [4 + number])
        assert [heard[1] for heard in step[1:]] == list(range(NUM_LAYERS))
    for step in steps:
        for _, layer, topk, hidden in step[1:]:
            chosen = gate_topk(gates.gates[layer], hidden, TOP_K)
            assert np.array_equal(np.sort(chosen), np.sort(topk))


def test_changing_the_future_changes_nothing_said_before(folder: Path) -> None:
    """Law: what the cache is told up to a token does not depend on the tokens after it."""
    said: list[list[Array]] = []
    for last in (40, 90):
        gates = _live_gates(folder)
        with loaded(folder) as model:
            owner = moe_runtime.handle(model)
            foresight = Foresight(owner.engine, gates, OpenGate())
            attach(model, owner, foresight)
            told: list[Array] = []
            said.append(told)
            foresight._forecaster.advise = (  # type: ignore[method-assign]
                lambda predictions, layer, told=told: told.append(predictions.next_LE.copy())
            )
            cache = None
            with torch.no_grad():
                for token in (7, 8, 9, 10, 11, 12, last):
                    output = model(
                        input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True
                    )
                    cache = output.past_key_values
    num_before = 6 * (NUM_LAYERS + 1) + 1  # with what was said before the last token's first layer
    assert len(said[0]) == len(said[1]) == 7 * (NUM_LAYERS + 1)
    for first, second in zip(said[0][:num_before], said[1][:num_before], strict=True):
        assert np.array_equal(first, second, equal_nan=True)
    assert any((first == first).any() for first in said[0])


def test_the_models_own_routers_are_found_and_right(folder: Path) -> None:
    """Law: 'auto' takes the gates of the model, and what they choose is what the model chose."""
    with loaded(folder, predictor="auto") as model:
        expected = tokens(model)
        prediction = moe_runtime.handle(model).report()["prediction"]
    assert prediction["predictor"] == "gate_lookahead"
    assert prediction["mode"] in ("trial", "on", "off")
    assert prediction["why"]
    with loaded(folder) as model:
        assert tokens(model) == expected
        prediction = moe_runtime.handle(model).report()["prediction"]
        assert prediction == {"predictor": None, "mode": "off", "why": "predictor is off"}


def test_auto_says_why_not(folder: Path) -> None:
    """Law: where nothing is ever read, 'auto' is off and the report says why."""
    model = moe_runtime.load(folder, expert_memory=1.0, predictor="auto")
    prediction = moe_runtime.handle(model).report()["prediction"]
    assert prediction["why"] == "all experts fit in memory"
    moe_runtime.handle(model).close()


def _trace() -> Trace:
    topk = np.random.default_rng(0).integers(0, NUM_EXPERTS, (40, NUM_LAYERS, TOP_K))
    topk[..., 1] = (topk[..., 0] + 1) % NUM_EXPERTS
    return Trace.of({"topk": topk.astype(np.int16)}, num_experts=NUM_EXPERTS)


def _live_gates(folder: Path) -> LiveGates:
    model = moe_runtime.load(folder, predictor="gate_lookahead", warm_start=False)
    foresight = moe_runtime.handle(model).foresight
    assert foresight is not None
    gates = foresight.predictor
    assert isinstance(gates, LiveGates)
    moe_runtime.handle(model).close()
    return gates


def test_a_fitted_predictor_is_a_file(folder: Path, tmp_path: Path) -> None:
    """Law: a file is loaded and changes no token."""
    trace = _trace()
    file = tmp_path / "frequency.safetensors"
    save_predictor(Frequency.fit(trace, ModelFacts.of(trace)), file)
    with loaded(folder) as model:
        expected = tokens(model)
    with loaded(folder, predictor=file) as model:
        assert tokens(model) == expected
        assert moe_runtime.handle(model).report()["prediction"]["predictor"] == "frequency"


def test_a_predictor_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    """Law: both fingerprints stand in the error, and nothing is left open."""
    threads = threading.active_count()
    trace = _trace()
    facts = ModelFacts(
        fingerprint=Fingerprint(
            model="other", num_layers=NUM_LAYERS, num_experts=NUM_EXPERTS, top_k=TOP_K,
            checkpoint="0123456789abcdef",
        )
    )  # fmt: skip
    predictor = Frequency.fit(trace, ModelFacts.of(trace))
    file = tmp_path / "other.safetensors"
    object.__setattr__(predictor, "fingerprint", facts.fingerprint)
    save_predictor(predictor, file)
    both = r"other.*checkpoint 0123456789abcdef; wanted is .*top-2"
    with pytest.raises(PredictorError, match=both):
        moe_runtime.load(folder, expert_memory=0.4, predictor=file)
    assert threading.active_count() == threads


@pytest.mark.parametrize(
    ("predictor", "message"),
    [
        ("markov", "predictor 'markov' has to be fitted first; give the file"),
        ("oracle", "predictor 'oracle' is neither a file nor auto, off or gate_lookahead"),
    ],
)
def test_a_word_that_is_no_predictor_is_refused(folder: Path, predictor: str, message: str) -> None:
    """Law: the error says what there is."""
    with pytest.raises(PredictorError, match=message):
        moe_runtime.load(folder, predictor=predictor)


def test_restore_takes_everything_out(folder: Path) -> None:
    """Law: a restored model has no hooks of ours, and gives the same tokens."""
    model = moe_runtime.load(folder, expert_memory=0.4)
    before = {name: len(m._forward_pre_hooks) for name, m in model.named_modules()}
    expected = tokens(model)
    listen(model, random_guesses)
    tokens(model)
    moe_runtime.handle(model).restore()
    after = {name: len(m._forward_pre_hooks) for name, m in model.named_modules()}
    assert all(after[name] <= before[name] for name in before)
    assert not model._forward_hooks
    assert tokens(model) == expected


def test_an_error_in_a_forward_leaves_nothing_ahead(folder: Path) -> None:
    """Law: a forward that raises gives up what it read ahead; the next ones are right."""
    threads = threading.active_count()
    with loaded(folder) as model:
        expected = tokens(model)
        listen(model, certain_of_all)
        hook = model.get_submodule("model.layers.1.mlp.experts").register_forward_pre_hook(_fail)
        with pytest.raises(ZeroDivisionError):
            tokens(model)
        hook.remove()
        assert tokens(model) == expected
    assert threading.active_count() == threads


def _fail(*_: Any) -> None:
    raise ZeroDivisionError
