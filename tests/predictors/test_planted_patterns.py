"""Each predictor finds the pattern that is its own, on sequences it has not seen."""

from dataclasses import replace

import numpy as np
import pytest

from moe_runtime.predictors import path_network
from moe_runtime.predictors.ensemble import Ensemble
from moe_runtime.predictors.gate import gate_topk
from moe_runtime.predictors.gate_lookahead import GateCorrected, GateLookahead
from moe_runtime.predictors.metrics import score
from moe_runtime.predictors.predictor import ModelFacts, Predictor
from moe_runtime.predictors.registry import PREDICTORS
from moe_runtime.predictors.replay import replay
from moe_runtime.trace import Phase, Trace
from tests.predictors.planted import (
    NUM_LAYERS,
    TOP_K,
    WIDTH,
    Pattern,
    at_random,
    by_id,
    by_layer,
    by_sequence,
    by_two_ids,
    by_two_layers,
    facts_for,
    gates,
    planted,
)

CERTAIN = 0.95  # a pattern without noise, found but for the rare start of a sequence


def recall(predictor: Predictor, trace: Trace, moment: str, layers: slice = slice(None)) -> float:
    rows = trace.phase == Phase.DECODE
    said = replay(predictor, trace).probability[moment][rows]
    found = score(said[:, layers], trace.topk[rows][:, layers], num_slots=TOP_K)
    assert found is not None
    return found.recall


@pytest.mark.parametrize(
    ("pattern", "name", "moment", "layers"),
    [
        (by_id, "token_table", "step", slice(None)),
        (by_layer, "markov", "1", slice(None)),
        (by_layer, "markov", "3", slice(None)),
        (by_two_layers, "markov2", "1", slice(2, None)),
    ],
)
def test_a_planted_pattern_is_learnt(
    pattern: Pattern, name: str, moment: str, layers: slice
) -> None:
    train = planted(pattern, num_sequences=120)
    fitted = PREDICTORS[name].fit(train, facts_for(train))
    unseen = planted(pattern, num_sequences=5, seed=1)
    assert recall(fitted, unseen, moment, layers) > CERTAIN


def test_order_2_is_needed_where_two_layers_decide() -> None:
    train = planted(by_two_layers, num_sequences=120)
    unseen = planted(by_two_layers, num_sequences=5, seed=1)
    order_1 = PREDICTORS["markov"].fit(train, facts_for(train))
    assert recall(order_1, unseen, "1", slice(2, None)) < 0.6


def test_a_token_that_repeats_the_one_before_is_expected() -> None:
    def pattern(ids: np.ndarray, sequence: int, random: np.random.Generator) -> np.ndarray:
        return np.repeat(at_random(ids[:1], sequence, random), len(ids), axis=0)

    train = planted(pattern)
    fitted = PREDICTORS["previous_token"].fit(train, facts_for(train))
    unseen = planted(pattern, num_sequences=5, seed=1)
    assert recall(fitted, unseen, "step") > CERTAIN
    assert recall(fitted, unseen, "next") > CERTAIN


def test_the_nearest_stored_sequence_is_of_the_right_sort() -> None:
    train = planted(by_sequence)
    fitted = PREDICTORS["activation_matrix"].fit(train, facts_for(train))
    unseen = planted(by_sequence, num_sequences=6, seed=1)
    said = replay(fitted, unseen).probability["step"]
    decoded = unseen.phase == Phase.DECODE
    low = said[..., :4].sum(-1) > said[..., 4:].sum(-1)
    is_even = (unseen.sequence_id % 2 == 0)[:, None]
    assert (low == is_even)[decoded].all()


def test_an_unseen_id_takes_the_counts_of_the_id_with_the_nearest_embedding() -> None:
    train = planted(by_id)
    assert train.token_id is not None
    seen = train.select(train.token_id != 7)
    embedding = np.eye(12, dtype=np.float32)
    embedding[7] = embedding[3] + 0.1 * embedding[5]
    facts = ModelFacts(fingerprint=facts_for(train).fingerprint, embedding=embedding)
    table = PREDICTORS["token_table"].fit(seen, facts)
    of_ids = table.of_ids(np.array([3, 7, 5]))  # type: ignore[attr-defined]
    np.testing.assert_array_equal(of_ids[1], of_ids[0])
    assert (of_ids[1] != of_ids[2]).any()
    blind = PREDICTORS["token_table"].fit(seen, replace(facts, embedding=None))
    everybody = blind.of_ids(np.array([7, -1, 10**6]))  # type: ignore[attr-defined]
    np.testing.assert_array_equal(everybody, np.broadcast_to(everybody[:1], everybody.shape))


@pytest.mark.parametrize("name", ["routing_path", "routing_path_decoder", "pregate"])
def test_a_network_reads_more_than_the_token_itself(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(path_network, "_WIDTH", 64)  # seconds instead of tens of them
    train = planted(by_two_ids, num_sequences=100)
    unseen = planted(by_two_ids, num_sequences=5, seed=1)
    fitted = PREDICTORS[name].fit(train, facts_for(train))
    table = PREDICTORS["token_table"].fit(train, facts_for(train))
    assert recall(fitted, unseen, "step") > recall(table, unseen, "step") + 0.2


def seen_by_gates(*, turns: bool, num_sequences: int, seed: int) -> Trace:
    """Routing by the planted gates; layers see one vector, which `turns` a little in each."""
    trace = planted(at_random, num_sequences=num_sequences, seed=seed)
    random = np.random.default_rng(seed)
    hidden = np.repeat(random.normal(size=(trace.num_tokens, 1, WIDTH)), NUM_LAYERS, axis=1)
    if turns:
        turn = np.linalg.qr(np.random.default_rng(9).normal(size=(WIDTH, WIDTH)))[0]
        for layer in range(1, NUM_LAYERS):
            hidden[:, layer] = hidden[:, layer - 1] @ turn
    topk = np.stack([gate_topk(g, hidden[:, i], TOP_K) for i, g in enumerate(gates())], axis=1)
    return replace(trace, topk=topk, hidden=hidden.astype(np.float16))


def test_a_gate_sees_ahead_where_its_input_stays_the_same() -> None:
    train = seen_by_gates(turns=False, num_sequences=40, seed=0)
    fitted = GateLookahead.fit(train, facts_for(train))
    unseen = seen_by_gates(turns=False, num_sequences=3, seed=1)
    for moment in ("1", "2", "3"):
        assert recall(fitted, unseen, moment) > CERTAIN


def test_a_correction_learns_what_changes_between_layers() -> None:
    train = seen_by_gates(turns=True, num_sequences=300, seed=0)
    unseen = seen_by_gates(turns=True, num_sequences=5, seed=1)
    gate_alone = recall(GateLookahead.fit(train, facts_for(train)), unseen, "1")
    corrected = recall(GateCorrected.fit(train, facts_for(train)), unseen, "1")
    assert gate_alone < 0.6
    assert corrected > gate_alone + 0.2


def test_an_ensemble_is_no_worse_than_its_best_member() -> None:
    train = planted(by_layer, num_sequences=60)
    train = replace(train, token_id=None)
    fitted = Ensemble.fit(train, ModelFacts.of(train))
    unseen = replace(planted(by_layer, num_sequences=5, seed=1), token_id=None)
    assert recall(fitted, unseen, "1") > CERTAIN
    assert "markov" in fitted.weights["1"]
    rows = unseen.phase == Phase.DECODE
    found = score(
        replay(fitted, unseen).probability["step"][rows], unseen.topk[rows], num_slots=TOP_K
    )
    assert found is not None
    assert found.calibration_error < 0.05
