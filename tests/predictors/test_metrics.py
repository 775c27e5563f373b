"""Laws of the measures: each equals what a slow count of its definition gives."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.predictors.evaluation import router_input_cosines, slots_of_budget
from moe_runtime.predictors.metrics import score, top_experts
from moe_runtime.trace import Trace
from moe_runtime.trace_fields import Array


def cases(seed: int, *, is_missing: bool = False) -> tuple[Array, Array]:
    """What was said `[N, L, E]` and chosen `[N, L, K]`."""
    random = np.random.default_rng(seed)
    num_rows, num_layers, num_experts, top_k = 40, 3, 6, 2
    said = random.random((num_rows, num_layers, num_experts)).astype(np.float16)
    chosen = np.argsort(random.random(said.shape), axis=-1)[..., :top_k].astype(np.int16)
    if is_missing:
        said[3:6, 1] = np.nan
        chosen[::4, 0] = -1
        chosen[::3, 2, 1] = -1
    return said, chosen


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**16), st.booleans())
def test_recall_and_precision_equal_a_slow_count(seed: int, is_missing: bool) -> None:
    said, chosen = cases(seed, is_missing=is_missing)
    recalls, precisions, slot_recalls = [], [], []
    for row in range(len(said)):
        for layer in range(said.shape[1]):
            truth = {int(e) for e in chosen[row, layer] if e >= 0}
            if not truth or np.isnan(said[row, layer]).any():
                continue
            order = sorted(range(6), key=lambda e: (-float(said[row, layer, e]), e))
            recalls.append(len(truth & set(order[:2])) / len(truth))
            precisions.append(len(truth & set(order[:2])) / 2)
            slot_recalls.append(len(truth & set(order[:4])) / len(truth))
    found = score(said, chosen, num_slots=4)
    assert found is not None
    assert found.num_rows == len(recalls)
    assert found.recall == pytest.approx(np.mean(recalls))
    assert found.precision == pytest.approx(np.mean(precisions))
    assert found.slot_recall == pytest.approx(np.mean(slot_recalls))


def test_the_truth_itself_is_right_and_calibrated() -> None:
    _, chosen = cases(0)
    said = np.zeros((*chosen.shape[:2], 6), np.float16)
    np.put_along_axis(said, chosen.astype(np.int64), 1.0, axis=-1)
    found = score(said, chosen, num_slots=2)
    assert found is not None
    assert (found.recall, found.precision, found.slot_recall) == (1, 1, 1)
    assert found.calibration_error == 0
    assert set(found.batch_recall.values()) == {1.0}


def test_guesses_reach_the_chance_level_and_not_more() -> None:
    """The chance of a batch is 1 - (1 - K/E)^B: what large numbers of guesses come to."""
    random = np.random.default_rng(0)
    shape = 8000, 1, 8
    said = random.random(shape).astype(np.float16)
    chosen = np.argsort(random.random(shape), axis=-1)[..., :2].astype(np.int16)
    found = score(said, chosen, num_slots=2)
    assert found is not None
    for size, share in found.batch_recall.items():
        assert found.batch_chance[size] == pytest.approx(1 - 0.75**size)
        assert share == pytest.approx(found.batch_chance[size], abs=0.02)


def test_calibration_error_is_how_far_what_was_said_is_from_what_happened() -> None:
    chosen = np.zeros((100, 1, 1), np.int16)
    said = np.full((100, 1, 2), [0.7, 0.1], np.float16)  # happened: 1 and 0
    found = score(said, chosen, num_slots=1)
    assert found is not None
    assert found.calibration_error == pytest.approx((0.3 + 0.1) / 2, abs=1e-3)


def test_batches_are_made_of_rows_of_which_something_was_said() -> None:
    said, chosen = cases(0)
    said[5:] = np.nan
    found = score(said, chosen, num_slots=2)
    assert found is not None
    assert set(found.batch_recall) == {1, 4}
    assert found.batch_recall[1] == pytest.approx(found.recall)


def test_where_nothing_was_said_there_is_no_score() -> None:
    said, chosen = cases(0)
    assert score(np.full_like(said, np.nan), chosen, num_slots=2) is None


def test_of_equal_probabilities_the_lower_expert_comes_first() -> None:
    assert top_experts(np.zeros((1, 4)), 3).tolist() == [[0, 1, 2]]


def test_router_inputs_that_are_parallel_have_cosine_1_and_orthogonal_ones_0() -> None:
    hidden = np.array([[[1, 0], [2, 0], [0, 3]]], np.float16)
    trace = Trace.of({"topk": np.zeros((1, 3, 1), np.int16), "hidden": hidden})
    assert router_input_cosines(trace) == {"1": [1, 0], "2": [0]}


def test_a_budget_is_rounded_down_to_whole_slots_and_leaves_one() -> None:
    assert [slots_of_budget(share, 20) for share in (0.35, 0.34, 0.0, 1.0)] == [7, 6, 1, 20]
