"""Laws of what a predictor tells a cache: each visit, of the next use of every key."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.errors import PredictorError
from moe_runtime.expert import ExpertKey
from moe_runtime.predictors.predictor import Forecast, ModelFacts
from moe_runtime.simulate.accesses import Accesses
from moe_runtime.simulate.advice import advice
from moe_runtime.simulate.replay import replay_all
from moe_runtime.trace import Trace
from tests.simulate.oracle import Oracle
from tests.simulate.traces import make_trace


@given(seed=st.integers(0, 1000), missing=st.sampled_from([0.0, 0.6]))
@settings(max_examples=50)
def test_each_visit_hears_of_the_next_use_of_every_key(seed: int, missing: float) -> None:
    """Law: from one that knows all comes, per visit, whether the next visit of a layer uses it."""
    trace = make_trace(seed, num_tokens=8, missing=missing)
    oracle = Oracle.fit(trace, ModelFacts.of(trace))
    visits = list(Accesses.of(trace).visits())
    told = list(advice(oracle, trace))
    assert len(told) == len(visits)
    steps = Accesses.of(trace).step.tolist()
    for keys, step, said in zip(visits, steps, told, strict=True):
        token = trace.step.tolist().index(step)
        last = keys[0].layer
        for layer in range(trace.num_layers):
            row = token + (layer <= last)
            ids = trace.topk[row, layer] if row < trace.num_tokens else np.array([-1])
            for expert in range(trace.num_experts):
                assert said[ExpertKey(layer, expert)] == float(expert in ids.tolist())


def test_a_batch_wants_what_any_row_wants() -> None:
    """Law: rows are independent: 1 - (1 - p)(1 - q)."""
    trace = Trace.of({"topk": np.array([[[0]], [[1]]]), "step": np.array([0, 0])}, num_experts=8)

    class Half(Oracle):
        def start(self) -> "HalfSession":  # type: ignore[override]
            return HalfSession()

    class HalfSession:
        def begin(self, rows: object) -> Forecast:
            return Forecast(first_layer=0, probability=np.full((2, 1, 8), 0.5, np.float32))

        def observe(self, layer: int, topk: object, hidden: object) -> Forecast:
            half = np.full((2, 1, 8), 0.5, np.float32)
            return Forecast(first_layer=1, probability=half[:, :0], next_step=half)

    half = Half.fit(trace, ModelFacts.of(trace))
    (said,) = advice(half, trace)
    # Both rows are of one sequence, and the next token follows the last of them only.
    assert set(said.values()) == {0.5}


def test_a_field_that_is_needed_and_absent_is_named() -> None:
    """Law: a trace that lacks what the predictor needs is refused, with the field."""
    trace = make_trace(0, num_tokens=4)

    class Needy(Oracle):
        needs = frozenset({"hidden"})

    with pytest.raises(PredictorError, match="predictor oracle needs hidden"):
        next(advice(Needy.fit(trace, ModelFacts.of(trace)), trace))


def test_perfect_advice_is_worth_hits_and_is_named() -> None:
    """Law: told the next use of every key, plec hits more; results say whose predictions."""
    trace = make_trace(0, num_tokens=300)
    accesses = Accesses.of(trace)
    (silent,) = replay_all(accesses, slots=[9], policies=["plec"])
    (told, lru) = replay_all(
        accesses,
        slots=[9],
        policies=["plec", "lru"],
        predictor=Oracle.fit(trace, ModelFacts.of(trace)),
        trace=trace,
        keep_hits=True,
    )
    assert told.hits > 1.1 * silent.hits
    assert (silent.predictor, told.predictor, lru.predictor) == (None, "oracle", None)
    assert told.is_hit is not None
    assert told.is_hit.sum() == told.hits
