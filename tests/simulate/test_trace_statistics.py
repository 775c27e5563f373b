"""Statistics of a trace agree with counting by hand."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.simulate.trace_statistics import (
    mutual_information_bits,
    reuse_distances,
    trace_statistics,
)
from moe_runtime.trace import Phase, Trace

SHARED = Path(__file__).resolve().parents[3] / "shared" / "traces" / "gptoss20b.npz"
ROUNDING = 1e-12


def one_layer(steps: Sequence[Sequence[int]], num_experts: int = 8) -> Trace:
    """A trace of one layer and top-1: row after row, the experts of each step."""
    topk = [expert for experts in steps for expert in experts]
    step = [number for number, experts in enumerate(steps) for _ in experts]
    return Trace.of(
        {"topk": np.array(topk).reshape(-1, 1, 1), "step": np.array(step)}, num_experts=num_experts
    )


def slow_reuse(steps: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Distances by looking back, one use after the other."""
    found = []
    for now, experts in enumerate(steps):
        for expert in sorted(set(experts)):
            before = [s for s in range(now) if expert in steps[s]]
            if before:
                between = {e for s in range(before[-1] + 1, now) for e in steps[s]}
                found.append((now - before[-1], len(between)))
    return found


@given(steps=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3), min_size=1, max_size=40))
def test_reuse_is_what_looking_back_finds(steps: list[list[int]]) -> None:
    """Law: distances in steps and in experts strictly between two uses, whoever used them."""
    in_steps, in_experts = reuse_distances(one_layer(steps), 0)
    assert list(zip(in_steps.tolist(), in_experts.tolist(), strict=True)) == slow_reuse(steps)


def test_reuse_does_not_end_at_a_chunk() -> None:
    """Law: a long trace, counted piece by piece, gives what a whole one would."""
    rng = np.random.default_rng(0)
    steps = rng.integers(0, 6, (5000, 1)).tolist()
    steps[0] = [7]
    steps[4900] = [7]
    in_steps, in_experts = reuse_distances(one_layer(steps), 0)
    assert (4900, 6) in zip(in_steps.tolist(), in_experts.tolist(), strict=True)
    last = {expert: step for step, (expert,) in enumerate(steps[:4096])}
    expected = min(s for s in range(4096, 5000) if steps[s] == [0]) - last[0]
    at = [step for step, (expert,) in enumerate(steps) if expert == 0]
    assert np.diff(at)[np.searchsorted(at, 4096) - 1] == expected
    np.testing.assert_array_equal(np.bincount(in_steps).sum(), len(slow_reuse(steps[:300])) + 4700)


def test_load_and_entropy_of_known_counts() -> None:
    """Law: shares 1/2, 1/4, 1/4 of 4 experts have 1.5 bits of 2, and the busiest twice the mean."""
    layer = trace_statistics(one_layer([[0], [0], [1], [2]], num_experts=4)).layers[0]
    assert layer.num_used_experts == 3
    assert layer.max_load == 2.0
    assert layer.load_entropy == pytest.approx(0.75, abs=ROUNDING)
    assert layer.median_reuse_steps == 1.0
    assert layer.median_reuse_experts == 0.0
    assert layer.next_layer_bits is None


def test_padding_counts_for_reuse_only() -> None:
    """Law: padding occupies caches, and says nothing of the text."""
    trace = Trace.of(
        {
            "topk": np.array([3, 3, 1]).reshape(3, 1, 1),
            "phase": np.array([Phase.PADDING, Phase.PADDING, Phase.DECODE]),
        }
    )
    found = trace_statistics(trace)
    assert found.phases == {"prefill": 0, "decode": 1, "padding": 2}
    assert found.layers[0].num_used_experts == 1
    assert found.layers[0].median_reuse_steps == 1.0


def test_mutual_information_of_known_columns() -> None:
    """Law: a copy tells its entropy, an independent column nothing; missing ids are left out."""
    here = np.repeat(np.arange(4), 4)
    assert mutual_information_bits(here, here, 4) == pytest.approx(2.0, abs=ROUNDING)
    assert mutual_information_bits(here, np.tile(np.arange(4), 4), 4) == pytest.approx(
        0.0, abs=ROUNDING
    )
    there = np.where(here == 3, -1, here)
    assert mutual_information_bits(here, there, 4) == pytest.approx(math.log2(3), abs=ROUNDING)


def test_dependence_stands_out_from_its_control() -> None:
    """Law: permuting takes the dependence of two layers away and leaves the bias of the counts."""
    rng = np.random.default_rng(1)
    first = rng.integers(0, 8, 4000)
    second = np.where(rng.random(4000) < 0.5, (first + 1) % 8, rng.integers(0, 8, 4000))
    trace = Trace.of({"topk": np.stack([first, second], 1)[..., None]})
    layer = trace_statistics(trace).layers[0]
    assert layer.next_layer_bits is not None
    assert layer.permuted_bits is not None
    bias = (8 - 1) ** 2 / (2 * 4000 * math.log(2))  # Miller, Madow: of the plug-in estimate
    assert bias / 2 < layer.permuted_bits < 2 * bias
    assert layer.next_layer_bits > 50 * layer.permuted_bits


def test_a_trace_of_nothing_but_missing_rows_has_no_reuse() -> None:
    """Law: a layer that was never seen has no figures to show, and the rest does."""
    topk: Any = np.array([[[0], [-1]], [[0], [-1]]])
    found = trace_statistics(Trace.of({"topk": topk}))
    assert found.num_missing == 2
    assert found.layers[1].max_load == 0.0
    assert found.layers[1].load_entropy == 0.0
    assert found.layers[1].median_reuse_steps is None
    assert found.layers[0].next_layer_bits == 0.0


@pytest.mark.skipif(not SHARED.is_file(), reason="the trace ../shared/traces is absent")
def test_real_layers_depend_on_each_other() -> None:
    """Law: on gpt-oss-20b, neighbours share over a bit, and permuted ones next to none."""
    with np.load(SHARED, allow_pickle=False) as archive:
        trace = Trace.of({"topk": archive["topk"][:20000, :3]})
    for layer in trace_statistics(trace).layers[:-1]:
        assert layer.next_layer_bits is not None
        assert layer.permuted_bits is not None
        assert layer.next_layer_bits > 1.0
        assert layer.permuted_bits < 0.1
