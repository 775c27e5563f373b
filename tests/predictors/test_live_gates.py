"""Laws of gates that are trusted as far as they proved right."""

import numpy as np
import pytest

from moe_runtime.predictors.gate import gate_topk
from moe_runtime.predictors.live_gates import LiveGates
from moe_runtime.predictors.predictor import Fingerprint, Gate, StepRows

L, E, K, D = 4, 8, 2, 16
FINGERPRINT = Fingerprint(model="unknown", num_layers=L, num_experts=E, top_k=K)


def gates(rng: np.random.Generator) -> list[Gate]:
    zeros = np.zeros(E, np.float32)
    return [
        Gate(
            weight=rng.normal(size=(E, D)).astype(np.float32),
            bias=zeros,
            selection_bias=zeros,
            is_sigmoid=False,
        )
        for _ in range(L)
    ]


def rows(number: int) -> StepRows:
    return StepRows(
        token_id=np.zeros(number, np.int32),
        sequence_id=np.arange(number, dtype=np.int32),
        position=np.ones(number, np.int32),
        phase=np.ones(number, np.uint8),
    )


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("is_right", [True, False])
def test_chances_become_what_proved_right(num_rows: int, is_right: bool) -> None:
    """Law: where the stream stays, the first k ranks become certain; in noise, rare."""
    rng = np.random.default_rng(0)
    predictor = LiveGates(FINGERPRINT, gates(rng))
    session = predictor.start()
    for _ in range(300):
        session.begin(rows(num_rows))
        stream = rng.normal(size=(num_rows, D)).astype(np.float32)
        for layer in range(L):
            hidden = stream if is_right else rng.normal(size=(num_rows, D)).astype(np.float32)
            topk = gate_topk(predictor.gates[layer], hidden, K)
            said = session.observe(layer, topk, hidden).probability
            assert said.shape == (num_rows, min(2, L - 1 - layer), E)
            assert ((said > 0) & (said <= 1)).all()
    learnt = predictor.chances[2:]  # foretold from both distances
    if is_right:
        assert (learnt[..., :K] > 0.99).all()
        assert (learnt[..., K:] < 0.01).all()
    else:
        assert (learnt < 0.6).all()
        assert abs(learnt.mean() - K / E) < 0.1


def test_the_most_probable_are_the_gates_choice() -> None:
    """Law: the k most probable experts of a layer ahead are what its gate says of this input."""
    rng = np.random.default_rng(1)
    predictor = LiveGates(FINGERPRINT, gates(rng))
    session = predictor.start()
    hidden = rng.normal(size=(1, D)).astype(np.float32)
    session.begin(rows(1))
    said = session.observe(0, np.array([[0, 1]], np.int16), hidden).probability
    for ahead in (0, 1):
        chosen = gate_topk(predictor.gates[1 + ahead], hidden, K)[0]
        predictor.chances[:] = 0.5
        assert (said[0, ahead, chosen] == 0.5).all()


def test_without_the_routers_input_nothing_is_said() -> None:
    """Law: no input, no horizon; a padded choice is no choice."""
    predictor = LiveGates(FINGERPRINT, gates(np.random.default_rng(2)))
    session = predictor.start()
    session.begin(rows(1))
    found = session.observe(0, np.array([[-1, -1]], np.int16), None)
    assert found.probability.shape == (1, 0, E)
