"""Laws of the reuse network: what it says visit by visit is what it was fitted to say."""

import numpy as np
import pytest
import torch

from moe_runtime.errors import PredictorError
from moe_runtime.predictors import reuse_network
from moe_runtime.predictors.predictor import ModelFacts, StepRows
from moe_runtime.predictors.reuse_history import ReuseHistory
from moe_runtime.predictors.reuse_network import ReuseNetwork
from moe_runtime.trace import Trace
from tests.simulate.traces import make_trace

# Sums of 32-bit floats of order 1, kept up over some hundred visits.
TOLERANCE = 1e-4


@pytest.fixture
def trace(monkeypatch: pytest.MonkeyPatch) -> Trace:
    monkeypatch.setattr(reuse_network, "_STEPS", 40)
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
            x = history.inputs.ravel()
            hidden = np.maximum(x @ found.input.reshape(len(x), -1) + found.input_bias[layer], 0)
            z = (hidden @ found.output + found.output_bias).reshape(2, *history.inputs.shape[1:])
            z += np.einsum("lef,olf->ole", history.direct(), found.direct)
            expected = 1 / (1 + np.exp(-z))
            assert said.next_step is not None
            assert said.later is not None
            np.testing.assert_allclose(said.next_step[0], expected[0], atol=TOLERANCE)
            np.testing.assert_allclose(said.later[0], expected[1], atol=TOLERANCE)


def test_examples_are_the_history_and_the_true_future(trace: Trace) -> None:
    """Law: what is learned from is what is known at a visit, and when each key is used after it."""
    examples = reuse_network._Examples.of(trace.topk, trace.num_experts)
    used = examples.inputs[:, 0] > 0
    for token, layer, expert in np.ndindex(20, trace.num_layers, trace.num_experts):
        ahead = torch.nonzero(used[token:, layer, expert])
        expected = int(ahead[0]) if len(ahead) else None
        if expected is not None:
            assert int(examples.ahead[token, layer, expert]) == expected


def test_it_learns_who_follows_whom(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: where tokens take three paths in turn, the next one's experts are foretold."""
    monkeypatch.setattr(reuse_network, "_STEPS", 200)
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
