"""The hit rates that a planner reads are those of the cache that runs the model."""

import pytest

from moe_runtime.integrations.transformers.spec_reader import spec_of_fields
from moe_runtime.simulate.accesses import Accesses
from moe_runtime.simulate.hit_rates import hit_curve
from moe_runtime.simulate.replay import replay_all
from tests.simulate.traces import make_trace


def test_a_models_own_curve_is_read_as_simulated() -> None:
    trace = make_trace(0, num_tokens=400, rows_per_step=1)
    spec = spec_of_fields(
        "m",
        {
            "model_type": "mixtral", "hidden_size": 8, "num_attention_heads": 2,
            "num_hidden_layers": trace.num_layers, "vocab_size": 11, "intermediate_size": 16,
            "num_local_experts": trace.num_experts, "num_experts_per_tok": trace.top_k,
        },
    )  # fmt: skip
    curve = hit_curve(trace, is_own=True)
    accesses = Accesses.of(trace)
    for slots in (accesses.num_keys // 4, accesses.num_keys // 2):
        (result,) = replay_all(accesses, slots=[slots], policies=["lru"])
        assert curve.at(slots, spec, 1) == pytest.approx(result.hit_rate, abs=1e-9)
    assert curve.at(accesses.num_keys, spec, 1) == 1
    assert curve.used_experts(spec, 1) == pytest.approx(spec.experts_per_token, rel=1e-3)


def test_steps_of_several_tokens_use_the_experts_that_were_recorded() -> None:
    trace = make_trace(0, num_tokens=400, rows_per_step=4)
    curve = hit_curve(trace, batch=4, is_own=True)
    accesses = Accesses.of(trace)
    assert curve.used_share == pytest.approx(len(accesses) / trace.num_steps / accesses.num_keys)
    assert curve.used_share > trace.top_k / trace.num_experts
