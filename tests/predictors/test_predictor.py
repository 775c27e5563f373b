"""Laws of the words that predictors and caches exchange."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.expert import ExpertKey
from moe_runtime.predictors.predictor import Fingerprint, demand

OF = Fingerprint(model="m", num_layers=2, num_experts=3, top_k=1, checkpoint="a")


@given(
    st.lists(
        st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=6, max_size=6),
        min_size=1,
        max_size=4,
    )
)
def test_whatever_is_said_only_probabilities_reach_a_cache(said: list[list[float]]) -> None:
    found = demand(np.array(said, np.float32).reshape(-1, 2, 3), first_layer=4)
    assert list(found) == [ExpertKey(layer, e) for layer in (4, 5) for e in range(3)]
    for index, value in enumerate(found.values()):
        column = [row[index] for row in said]
        clean = [min(max(p, 0.0), 1.0) if math.isfinite(p) else 0.0 for p in column]
        assert value == pytest.approx(1 - math.prod(1 - p for p in clean), abs=1e-6)
        assert 0 <= value <= 1


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        ({}, True),
        ({"model": "other name of the same weights"}, True),
        ({"checkpoint": ""}, True),
        ({"checkpoint": "b"}, False),
        ({"checkpoint": "", "model": "other"}, False),
        ({"checkpoint": "", "model": "unknown"}, True),
        ({"num_experts": 4}, False),
        ({"num_layers": 3}, False),
        ({"top_k": 2}, False),
    ],
)
def test_digests_tell_models_apart_and_names_where_there_is_none(
    change: dict[str, str | int], fits: bool
) -> None:
    other = replace(OF, **change)  # type: ignore[arg-type]
    assert OF.fits(other) is fits
    assert other.fits(OF) is fits
