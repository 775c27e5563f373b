"""Laws that every predictor keeps, whatever it has learnt."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moe_runtime.predictors import ensemble, gate_lookahead, path_network, path_training
from moe_runtime.predictors.predictor import Forecast, Predictor, StepRows
from moe_runtime.predictors.registry import PREDICTORS
from moe_runtime.predictors.replay import MOMENTS, replay, steps_of
from moe_runtime.predictors.store import load_predictor, save_predictor
from moe_runtime.trace import Phase, Trace
from moe_runtime.trace_fields import Array
from tests.predictors.planted import NUM_EXPERTS, NUM_LAYERS, TOP_K, by_two_ids, facts_for, planted


@pytest.fixture(scope="module")
def trace() -> Trace:
    return planted(by_two_ids, num_sequences=12, hidden=True)


@pytest.fixture(scope="module")
def fitted(trace: Trace) -> Iterator[dict[str, Predictor]]:
    """All of them; those that learn do so briefly, as these laws need no skill."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(path_training, "_TOKENS", 1)
        patch.setattr(path_network, "_WIDTH", 32)
        patch.setattr(gate_lookahead, "_EPOCHS", 1)
        patch.setattr(ensemble, "_LEAST_GAIN", -1.0)  # every member takes part
        yield {name: kind.fit(trace, facts_for(trace)) for name, kind in PREDICTORS.items()}


@pytest.fixture(params=list(PREDICTORS))
def predictor(request: pytest.FixtureRequest, fitted: dict[str, Predictor]) -> Predictor:
    return fitted[request.param]


def forecasts(predictor: Predictor, trace: Trace) -> list[Forecast]:
    """All that one session says along a trace."""
    session = predictor.start()
    said = []
    for rows in steps_of(trace):
        said.append(session.begin(StepRows.of(trace, rows)))
        for layer in range(trace.num_layers):
            hidden = None if trace.hidden is None else trace.hidden[rows, layer]
            said.append(session.observe(layer, trace.topk[rows, layer], hidden))
    return said


def batched(trace: Trace) -> Trace:
    """Its decoded tokens, those of all sequences at one place in one step, and a row of padding."""
    rows = np.flatnonzero(trace.phase == Phase.DECODE)
    rows = rows[np.lexsort((trace.sequence_id[rows], trace.position[rows]))]
    fields = {name: array[rows] for name, array in trace.arrays().items()}
    fields["step"] = fields["position"].astype(np.int64)
    fields["position"], fields["phase"] = fields["position"].copy(), fields["phase"].copy()
    fields["position"][5], fields["phase"][5] = -1, Phase.PADDING
    return Trace.of(fields | {"num_experts": NUM_EXPERTS, "model": trace.model})


@pytest.mark.parametrize("is_batched", [False, True])
def test_it_says_probabilities_of_layers_that_lie_ahead(
    predictor: Predictor, trace: Trace, is_batched: bool
) -> None:
    found = batched(trace) if is_batched else trace
    said = iter(forecasts(predictor, found))
    for rows in steps_of(found):
        for layer in range(-1, NUM_LAYERS):
            forecast = next(said)
            num_rows = rows.stop - rows.start
            assert forecast.first_layer == layer + 1
            assert forecast.probability.shape[0] == num_rows
            assert forecast.probability.shape[1] <= NUM_LAYERS - layer - 1
            arrays = [forecast.probability]
            if forecast.next_step is not None:
                assert forecast.next_step.shape == (num_rows, NUM_LAYERS, NUM_EXPERTS)
                arrays.append(forecast.next_step)
            for array in arrays:
                assert array.dtype == np.float32
                assert ((array >= 0) & (array <= 1)).all()


def test_changing_the_future_changes_nothing_that_was_said(
    predictor: Predictor, trace: Trace
) -> None:
    at = int(np.flatnonzero(trace.step == trace.step[trace.num_tokens // 2])[0])
    random = np.random.default_rng(0)
    topk, token_id = trace.topk.copy(), trace.token_id.copy()  # type: ignore[union-attr]
    topk[at:, 1:] = (topk[at:, 1:] + 1) % NUM_EXPERTS  # layer 0 of that step stays
    same_step = trace.step == trace.step[at]
    token_id[(np.arange(len(topk)) >= at) & ~same_step] = 0
    hidden = trace.hidden.copy()  # type: ignore[union-attr]
    hidden[at:, 1:] = random.normal(size=hidden[at:, 1:].shape)
    other = replace(trace, topk=topk, token_id=token_id, hidden=hidden)
    num_said = (NUM_LAYERS + 1) * len({*trace.step[:at].tolist()}) + 2
    before = zip(forecasts(predictor, trace), forecasts(predictor, other), strict=True)
    for index, (one, two) in enumerate(before):
        if index == num_said:
            break
        np.testing.assert_array_equal(one.probability, two.probability)
        if one.next_step is not None:
            np.testing.assert_array_equal(one.next_step, two.next_step)


def test_a_file_gives_the_same_predictor_back(
    predictor: Predictor, trace: Trace, tmp_path: Path
) -> None:
    size = save_predictor(predictor, tmp_path / "P.safetensors")
    assert size == (tmp_path / "P.safetensors").stat().st_size
    loaded = load_predictor(tmp_path / "P.safetensors", predictor.fingerprint)
    assert loaded.name == predictor.name
    for one, two in zip(forecasts(predictor, trace), forecasts(loaded, trace), strict=True):
        np.testing.assert_array_equal(one.probability, two.probability)


def test_a_forgotten_sequence_is_new(predictor: Predictor, trace: Trace) -> None:
    def says(*, is_forgotten: bool) -> Array:
        session = predictor.start()
        if is_forgotten:
            for rows in list(steps_of(trace))[:3]:
                session.begin(StepRows.of(trace, rows))
                for layer in range(NUM_LAYERS):
                    session.observe(layer, trace.topk[rows, layer], trace.hidden[rows, layer])  # type: ignore[index]
            session.forget(0)
        # Amid the sequence: what comes at its start is new anyhow.
        return session.begin(StepRows.of(trace, slice(11, 12))).probability

    if predictor.name == "random":
        pytest.skip("it never says the same twice")
    np.testing.assert_array_equal(says(is_forgotten=True), says(is_forgotten=False))


def test_without_hidden_states_nobody_fails(predictor: Predictor, trace: Trace) -> None:
    said = replay(predictor, replace(trace, hidden=None)).probability
    assert not np.isnan(said["step"]).any()
    assert set(said) == set(MOMENTS)
    assert said["1"].shape == (trace.num_tokens, NUM_LAYERS, NUM_EXPERTS)


def test_missing_experts_are_nobody(predictor: Predictor, trace: Trace) -> None:
    topk = trace.topk.copy()
    topk[::3, 1] = -1
    topk[::2, :, 1] = -1
    assert topk.shape[2] == TOP_K
    for forecast in forecasts(predictor, replace(trace, topk=topk)):
        assert np.isfinite(forecast.probability).all()
