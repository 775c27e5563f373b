"""Comparing prediction on and off: both decode the same, and the figures add up."""

from dataclasses import asdict
from pathlib import Path

import pytest

from moe_runtime.errors import PredictorError
from moe_runtime.measure.bench.prefetch_pairs import PairsRequest, run_pairs
from moe_runtime.measure.bench.routing import Routing
from tests.tiny_checkpoint import NUM_EXPERTS, NUM_LAYERS, TOP_K, save_mixtral


def request_of(folder: Path, **changes: object) -> PairsRequest:
    trace = Routing(name="uniform").rows(
        num_rows=64, num_layers=NUM_LAYERS, num_experts=NUM_EXPERTS, top_k=TOP_K
    )
    assert trace is not None
    settings: dict[str, object] = {
        "model": str(folder), "trace": trace, "predictor": "oracle", "expert_memory": "50%",
        "policy": "lru", "num_pairs": 3, "block_tokens": 2, "warm_tokens": 12, "is_gated": False,
    }  # fmt: skip
    return PairsRequest(**settings | changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("predictor", ["oracle", "gate_lookahead"])
def test_the_figures_of_pairs(tmp_path: Path, predictor: str) -> None:
    """Law: every pair is run on and off, and what is read ahead is the predictor's."""
    folder = save_mixtral(tmp_path / "model")
    heard: list[tuple[int, int]] = []
    found = run_pairs(
        request_of(folder, predictor=predictor), lambda done, total: heard.append((done, total))
    )
    assert heard == [(0, 3), (1, 3), (2, 3)]
    assert found.num_tokens == 2 * 3 * 2
    assert 0 < found.ratio <= found.upper
    for side in (found.off, found.on):
        assert side.milliseconds > side.stall_milliseconds >= 0
        assert 0 <= side.hit_rate <= 1
        assert 0 <= side.simulated_hit_rate <= 1
        assert side.bytes_read > 0
    assert found.prediction["predictor"] == predictor
    if predictor == "oracle":
        assert found.prediction["used"] > 0
        assert found.on.hit_rate > found.off.hit_rate
        assert found.on.simulated_hit_rate > found.off.simulated_hit_rate
    assert set(asdict(found)) >= {"ratio", "upper", "prediction"}


def test_without_a_predictor_there_is_nothing_to_compare(tmp_path: Path) -> None:
    """Law: where 'auto' is off for good, the reason is the error."""
    folder = save_mixtral(tmp_path / "model")
    with pytest.raises(PredictorError, match="all experts fit in memory"):
        run_pairs(
            request_of(folder, predictor="auto", expert_memory="100%"), lambda done, total: None
        )
