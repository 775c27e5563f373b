"""Laws of the reuse network: what it says visit by visit is what it was fitted to say."""

import numpy as np
import pytest

from moe_runtime.errors import PredictorError
from moe_runtime.predictors import reuse_training
from moe_runtime.predictors.predictor import ModelFacts, StepRows
from moe_runtime.predictors.reuse_history import ReuseHistory
from moe_runtime.predictors.reuse_network import ReuseNetwork
from moe_runtime.predictors.reuse_training import Reader
from moe_runtime.trace import Trace
from tests.simulate.traces import make_trace

# Sums of 32-bit floats of order 1, kept up over some hundred visits.
TOLERANCE = 1e-4


@pytest.fixture
def trace(monkeypatch: pytest.MonkeyPatch) -> Trace:
    monkeypatch.setattr(reuse_training, "_STEPS", 40)
    return make_trace(0, num_tokens=120)


def test_a_session_says_what_the_whole_network_says(trace: Trace) -> None:
    """Law: sums changed layer by layer are those of a forward over all that is known."""
    found = ReuseNetwork.fit(trace, ModelFacts.of(trace))
    session = found.start()
    history = ReuseHistory(trace.num_layers, trace.num_experts)
    for token in range(30):
        rows = slice(token, token + 1)
        session.begin(StepRows.of(trace, rows))
        for layer in range(trace.num_layers):
            said = session.observe(layer, trace.topk[rows, layer], None)
            history.visit(layer, trace.topk[token, layer])
            x = history.inputs
            after = layer + 1
            of_layers = np.concatenate([found.input[0, :after], found.input[1, after:]])
            hidden = np.einsum("lie,lieh->h", x, of_layers) + found.input_bias[layer]
            of_layers = np.concatenate([found.output[1, :after], found.output[0, after:]])
            z = of_layers @ np.maximum(hidden, 0) + found.output_bias
            own = np.stack([history.direct(layer) for layer in range(trace.num_layers)])
            expected = 1 / (1 + np.exp(-z - np.einsum("lfe,lfo->leo", own, found.direct)))
            assert said.next_step is not None
            assert said.later is not None
            np.testing.assert_allclose(said.next_step[0], expected[..., 0], atol=TOLERANCE)
            np.testing.assert_allclose(said.later[0], expected[..., 1], atol=TOLERANCE)


def test_examples_are_the_history_and_the_true_future(trace: Trace) -> None:
    """Law: what is learned from is what is known at a visit, and when each key is used after it."""
    num_layers, num_experts = trace.num_layers, trace.num_experts
    reader = Reader(trace.topk, num_experts, 1)
    history = ReuseHistory(num_layers, num_experts)
    used = np.zeros((trace.num_tokens, num_layers, num_experts), np.bool_)
    np.put_along_axis(used, trace.topk.astype(np.int64), True, -1)
    for token, layer in np.ndindex(40, num_layers):
        history.visit(layer, trace.topk[token, layer])
        sample = reader.sample(layer)
        np.testing.assert_allclose(sample.inputs[0], history.inputs, atol=TOLERANCE)
        own = np.stack([history.direct(layer) for layer in range(num_layers)])
        np.testing.assert_allclose(sample.direct[0], own, atol=TOLERANCE)
        for other, expert in np.ndindex(num_layers, num_experts):
            following = used[token + (other <= layer) :, other, expert]
            if following.any():
                assert sample.ahead[0, other, expert] == following.argmax()
        if layer == num_layers - 1:
            reader.move_on()


def test_it_learns_who_follows_whom(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: where tokens take three paths in turn, the next one's experts are foretold."""
    monkeypatch.setattr(reuse_training, "_STEPS", 200)
    topk = np.tile(np.array([[[0, 1]], [[2, 3]], [[4, 5]]]), (60, 2, 1))
    trace = Trace.of({"topk": topk}, num_experts=8)
    session = ReuseNetwork.fit(trace, ModelFacts.of(trace)).start()
    for token in range(12):
        rows = slice(token, token + 1)
        session.begin(StepRows.of(trace, rows))
        for layer in range(2):
            said = session.observe(layer, trace.topk[rows, layer], None)
    assert said.next_step is not None
    following = trace.topk[12]
    for layer in range(2):
        assert set(np.argsort(-said.next_step[0, layer])[:2]) == set(following[layer].tolist())


def test_too_few_tokens_are_refused() -> None:
    """Law: what is learned from next to nothing is not sold as a predictor."""
    trace = make_trace(0, num_tokens=10)
    with pytest.raises(PredictorError, match="the trace has 10 tokens"):
        ReuseNetwork.fit(trace, ModelFacts.of(trace))
