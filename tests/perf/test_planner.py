"""A plan fits, is the fastest of what was tried, and a refusal names the smallest budget."""

import json
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.errors import BudgetError, ConfigError
from moe_runtime.integrations.transformers.spec_reader import read_spec
from moe_runtime.model_preset import preset_names
from moe_runtime.perf.hardware_presets import (
    hardware_preset_names,
    load_hardware_preset,
    preset_of_gpu,
)
from moe_runtime.perf.hit_curve import HitCurve
from moe_runtime.perf.plan import Plan, PlanRequest
from moe_runtime.perf.planner import decode_rate, make_plan

EPYC = load_hardware_preset("2-core-epyc")
KEYS = {
    "bottleneck", "tokens_per_second", "settings", "memory", "runner_up", "what_would_help", "lens",
    "assumptions",
}  # fmt: skip


def request(name: str = "olmoe-1b-7b", **changes: object) -> PlanRequest:
    base = PlanRequest(spec=read_spec(name), hardware=EPYC)
    return replace(base, **changes)  # type: ignore[arg-type]


def check_fits(plan: Plan) -> None:
    for one in (plan.chosen, *plan.others):
        memory = one.memory
        parts = (
            memory.dense_bytes, memory.expert_bytes, memory.kv_bytes, memory.workspace_bytes,
            memory.reserve_bytes, memory.free_bytes,
        )  # fmt: skip
        assert min(parts) >= 0
        assert sum(parts) == memory.limit_bytes
        assert one.tokens_per_second <= plan.chosen.tokens_per_second


@settings(max_examples=30)
@given(
    name=st.sampled_from(preset_names()), machine=st.sampled_from(hardware_preset_names()),
    gibibytes=st.floats(1, 200), batch=st.sampled_from([None, 1, 7]),
)  # fmt: skip
def test_a_plan_fits_or_names_a_budget_that_does(
    name: str, machine: str, gibibytes: float, batch: int | None
) -> None:
    asked = request(
        name,
        hardware=load_hardware_preset(machine),
        memory_bytes=int(gibibytes * 2**30),
        batch=batch,
    )
    try:
        check_fits(make_plan(asked))
    except BudgetError as error:
        found = re.search(r"smallest budget that works is (\d+) bytes", str(error))
        assert found is not None
        enough = int(found[1])
        assert enough > asked.memory_bytes  # type: ignore[operator]
        check_fits(make_plan(replace(asked, memory_bytes=enough)))
        with pytest.raises(BudgetError):
            make_plan(replace(asked, memory_bytes=enough - 1))


def test_a_plan_is_json_with_every_key() -> None:
    plan = make_plan(request(goal="throughput"))
    found = json.loads(json.dumps(plan.as_dict(), allow_nan=False))
    assert set(found) >= KEYS
    assert found["lens"]["stage_one"]["tokens_per_second"] > 0
    assert found["lens"]["stage_two"]["tokens_per_second"] > 0
    assert found["runner_up"]["tokens_per_second"] <= found["tokens_per_second"]
    assert found["runner_up"]["settings"] != found["settings"]


def test_what_would_help_is_what_planning_again_says() -> None:
    asked = request("qwen3-30b-a3b")
    plan = make_plan(asked)
    helped = {remedy.change: remedy for remedy in plan.what_would_help}
    more = make_plan(replace(asked, memory_bytes=EPYC.memory.available_bytes + 16 * 2**30))
    remedy = helped["host memory +16 GiB"]
    assert remedy.tokens_per_second == pytest.approx(more.chosen.tokens_per_second)
    assert remedy.factor == pytest.approx(
        more.chosen.tokens_per_second / plan.chosen.tokens_per_second
    )
    packed = make_plan(replace(asked, spec=replace(asked.spec, is_packed=True)))
    assert packed.chosen.settings.expert_slots == "packed"
    assert helped["packed experts (moe-runtime pack)"].tokens_per_second == pytest.approx(
        packed.chosen.tokens_per_second
    )
    factors = [remedy.factor for remedy in plan.what_would_help]
    assert factors == sorted(factors, reverse=True)


def test_a_model_that_reads_its_disk_waits_for_it() -> None:
    assert make_plan(request("mixtral-8x7b")).bottleneck == "disk"
    assert make_plan(request("olmoe-1b-7b")).bottleneck == "memory and arithmetic"


def test_nothing_lossy_is_chosen_unless_allowed() -> None:
    small = {"memory_bytes": 8 * 2**30}
    assert make_plan(request(**small)).chosen.settings.expert_dtype == "auto"
    lossy = make_plan(request(allows_lossy=True, **small)).chosen.settings
    assert lossy.expert_dtype in ("int8", "int4")
    exact = make_plan(request(allows_lossy=True, is_exact=True, **small)).chosen.settings
    assert (exact.expert_dtype, exact.linears) == ("auto", False)


def test_a_plan_can_be_asked_for_another_context() -> None:
    asked = request("qwen3-30b-a3b")
    chosen = make_plan(asked).chosen
    context = asked.prompt_tokens + asked.new_tokens // 2
    assert decode_rate(asked, chosen, context) == pytest.approx(chosen.tokens_per_second)
    assert decode_rate(asked, chosen, 40) > chosen.tokens_per_second


def test_lfu_is_chosen_where_a_trace_says_that_it_hits_more() -> None:
    curves = {
        policy: HitCurve(shares=(0.5,), hit_rates=(rate,), used_share=0.125, source=f"by {policy}")
        for policy, rate in (("lru", 0.5), ("lfu", 0.8))
    }
    small = {"memory_bytes": 10 * 2**30}
    plan = make_plan(request(curves=curves, **small))
    assert plan.chosen.settings.policy == "lfu"
    assert "hit rates: by lfu" in plan.assumptions
    policies = {one.settings.policy for one in make_plan(request(**small)).others}
    assert "lfu" not in policies


def test_files_are_cached_where_all_of_them_fit_beside_the_plan() -> None:
    """A miss is then a copy of memory; a budget for experts alone leaves such room."""
    spec = read_spec("olmoe-1b-7b")
    half = {"expert_memory_bytes": spec.expert_total_bytes // 2, "fixed": {"predictor": "off"}}
    roomy = make_plan(request(**half))
    assert roomy.chosen.settings.page_cache
    assert roomy.chosen.settings.load_arguments(has_gpu=False)["page_cache"]
    assert roomy.chosen.memory.free_bytes >= spec.expert_total_bytes
    assert any("page cache" in assumption for assumption in roomy.assumptions)
    tight = make_plan(request(memory_bytes=10 * 2**30, fixed={"predictor": "off"}))
    assert not any(one.settings.page_cache for one in (tight.chosen, *tight.others))
    past = make_plan(request(**{**half, "fixed": {"predictor": "off", "page_cache": False}}))
    assert past.chosen.tokens_per_second < roomy.chosen.tokens_per_second


def test_what_is_fixed_stays() -> None:
    fixed = {"policy": "plec", "linears": False, "predictor": "off"}
    plan = make_plan(request("qwen3-30b-a3b", fixed=fixed))
    for one in (plan.chosen, *plan.others):
        found = {name: getattr(one.settings, name) for name in fixed}
        assert found == fixed


def test_a_budget_for_experts_is_kept() -> None:
    plan = make_plan(request(expert_memory_bytes=2 * 2**30))
    assert plan.chosen.settings.expert_memory <= 2 * 2**30
    with pytest.raises(BudgetError, match=r"smallest budget that works is 100663296 bytes"):
        make_plan(request(expert_memory_bytes=2**20))


def test_the_attention_cache_is_paid_before_slots() -> None:
    few = make_plan(request(memory_bytes=10 * 2**30, batch=1)).chosen
    many = make_plan(request(memory_bytes=10 * 2**30, batch=16)).chosen
    assert many.memory.kv_bytes == 16 * few.memory.kv_bytes
    assert many.settings.num_slots < few.settings.num_slots
    with pytest.raises(BudgetError, match="the smallest budget that works"):
        make_plan(request(memory_bytes=10 * 2**30, batch=500))


def test_throughput_takes_a_batch_where_latency_takes_one_sequence() -> None:
    assert make_plan(request()).chosen.settings.batch == 1
    assert make_plan(request(goal="throughput")).chosen.settings.batch > 1


def test_a_machine_without_a_disk_must_hold_all_experts() -> None:
    diskless = replace(EPYC, disk=None)
    assert make_plan(request(hardware=diskless)).chosen.step.hit_rate == 1
    with pytest.raises(ConfigError, match=r"no disk, and .* bytes of experts do not fit"):
        make_plan(request(hardware=diskless, memory_bytes=8 * 2**30))


def test_texts_beyond_the_models_context_are_refused() -> None:
    with pytest.raises(ValueError, match="exceed the context of 4096 tokens of olmoe-1b-7b"):
        request(prompt_tokens=4000, new_tokens=200)


def test_a_gpu_preset_is_found_by_its_drivers_name() -> None:
    assert preset_of_gpu("NVIDIA L4") == "l4"
    assert preset_of_gpu("RTX 9099") is None
    with pytest.raises(ValueError, match="the nearest is rtx4090"):
        load_hardware_preset("rtx490")


@pytest.mark.parametrize("name", ["rtx4090", "a100-80g", "h100", "l4", "t4"])
def test_datasheets_say_so_and_whose_they_are(name: str) -> None:
    machine = load_hardware_preset(name)
    assert machine.source == "datasheet"
    assert str(machine.url).startswith("https://")
    plan = make_plan(request("mixtral-8x7b", hardware=machine))
    assert any("datasheet" in assumption for assumption in plan.assumptions)


def test_throughput_on_a_gpu_is_set_beside_a_split_of_weights() -> None:
    plan = make_plan(
        request("mixtral-8x7b", hardware=load_hardware_preset("l4"), goal="throughput")
    )
    policy = plan.lens["policy"]
    assert policy["tokens_per_second"] > 0
    assert 0 <= policy["gpu_share"] <= 1
    assert make_plan(request(goal="throughput")).lens["policy"] is None
