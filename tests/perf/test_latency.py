"""A step takes what its lanes allow, and no setting makes the impossible possible."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.integrations.transformers.spec_reader import read_spec
from moe_runtime.perf.hardware import Hardware
from moe_runtime.perf.hardware_presets import load_hardware_preset
from moe_runtime.perf.hit_curve import LRU_PRIOR, PLEC_PRIOR, HitCurve
from moe_runtime.perf.latency import (
    LFU,
    LRU,
    PACKED_SHARE,
    PLEC,
    ExpertForm,
    Lane,
    LatencyModel,
    Setup,
)
from moe_runtime.perf.overheads import CPU_OVERHEADS, OPERATOR_SECONDS
from moe_runtime.perf.rates import Products, Rates

MACHINE = load_hardware_preset("2-core-epyc")
OLMOE = read_spec("olmoe-1b-7b")
# At the pace that overheads are stated for.
RATES = replace(Rates.of(MACHINE, value_bytes=2), operator_seconds=None)


def model(curve: HitCurve | None = None) -> LatencyModel:
    return LatencyModel(OLMOE, RATES, None if curve is None else {LRU: curve})


def setup(**changes: object) -> Setup:
    plain = ExpertForm.all_of(OLMOE)[0]
    base = Setup(
        form=plain, num_slots=512, num_host_slots=0, batch=1, context_tokens=100, policy="lru"
    )
    return replace(base, **changes)  # type: ignore[arg-type]


@given(num_slots=st.integers(1, 1024), batch=st.integers(1, 64))
def test_more_slots_never_make_a_step_slower(num_slots: int, batch: int) -> None:
    less = model().step(setup(num_slots=num_slots, batch=batch))
    more = model().step(setup(num_slots=num_slots + 16, batch=batch))
    assert more.hit_rate >= less.hit_rate - 1e-12
    assert more.seconds <= less.seconds * (1 + 1e-9)


@given(num_slots=st.integers(1, 1100), batch=st.integers(1, 64), linears=st.booleans())
def test_a_step_is_at_least_as_long_as_its_longest_lane_less_its_gain(
    num_slots: int, batch: int, linears: bool
) -> None:
    step = model().step(setup(num_slots=num_slots, batch=batch, linears=linears))
    assert step.seconds >= max(step.lanes.values())
    assert step.seconds <= sum(step.lanes.values()) * (1 + 1e-9) + OLMOE.num_experts


@given(num_slots=st.integers(1, 1023), batch=st.integers(1, 32))
def test_prediction_gains_no_more_than_the_lesser_of_copies_and_compute(
    num_slots: int, batch: int
) -> None:
    without = model().step(setup(num_slots=num_slots, batch=batch))
    ahead = model().step(setup(num_slots=num_slots, batch=batch, reads_ahead=True))
    computing = without.lanes[Lane.COMPUTE] + without.lanes[Lane.SOFTWARE]
    assert 0 <= without.seconds - ahead.seconds <= min(without.lanes[Lane.DISK], computing) + 1e-12
    assert ahead.gain_seconds == pytest.approx(without.seconds - ahead.seconds)


def test_with_everything_in_slots_nothing_is_read() -> None:
    step = model().step(setup(num_slots=1024))
    assert step.hit_rate == 1
    assert step.lanes[Lane.DISK] == 0
    used = OLMOE.step_bytes + OLMOE.experts_per_token * OLMOE.expert_bytes
    slowest, fastest = 17.69e9, 29.59e9
    software = step.lanes[Lane.SOFTWARE]
    assert software >= 16 * CPU_OVERHEADS.layer_seconds
    assert used / fastest < step.seconds - software < 1.01 * used / slowest


def test_packed_experts_take_fewer_bytes_of_disk_and_memory() -> None:
    packed_spec = replace(OLMOE, is_packed=True)
    plain, packed = ExpertForm.all_of(OLMOE)[0], ExpertForm.all_of(packed_spec)[0]
    assert packed.disk_bytes == PACKED_SHARE * plain.disk_bytes
    slow = model().step(setup())
    fast = model().step(setup(form=packed))
    assert fast.lanes[Lane.DISK] == pytest.approx(PACKED_SHARE * slow.lanes[Lane.DISK])
    assert fast.seconds < slow.seconds


def test_rounded_experts_are_read_whole_and_marked_lossy() -> None:
    forms = {form.name: form for form in ExpertForm.all_of(OLMOE)}
    assert forms["int4"].disk_bytes == forms["unpacked"].disk_bytes
    assert forms["int4"].slot_bytes < forms["int8"].slot_bytes < forms["unpacked"].slot_bytes
    assert [form.is_lossless for form in forms.values()] == [True, False, False]


def test_quantised_checkpoints_keep_their_bytes_and_cost_an_expansion() -> None:
    (form,) = ExpertForm.all_of(read_spec("gpt-oss-20b"))
    assert form.slot_bytes == form.disk_bytes < form.used_bytes


def test_software_takes_as_long_as_small_operators_do() -> None:
    """Law: on a processor half as fast, overheads double and lanes stay."""
    usual = model().step(setup())
    rates = replace(RATES, operator_seconds=2 * OPERATOR_SECONDS)
    slow = LatencyModel(OLMOE, rates).step(setup())
    assert slow.lanes[Lane.SOFTWARE] == pytest.approx(2 * usual.lanes[Lane.SOFTWARE])
    assert slow.lanes[Lane.DISK] == usual.lanes[Lane.DISK]
    assert slow.lanes[Lane.COMPUTE] == usual.lanes[Lane.COMPUTE]


def test_each_policy_has_the_hit_rates_of_its_own_curve() -> None:
    """Law: a policy without a curve has lru's."""
    low, high = (
        HitCurve(shares=(0.5,), hit_rates=(rate,), used_share=0.125, source="")
        for rate in (0.5, 0.8)
    )
    both = LatencyModel(OLMOE, RATES, {LRU: low, LFU: high})
    rates = {policy: both.step(setup(policy=policy)).hit_rate for policy in (LRU, LFU, PLEC)}
    assert rates[LFU] > rates[LRU] == rates[PLEC]


def test_a_missing_disk_makes_misses_take_forever() -> None:
    rates = replace(RATES, disk_bytes_per_second=None)
    assert LatencyModel(OLMOE, rates).step(setup()).seconds == float("inf")
    assert LatencyModel(OLMOE, rates).step(setup(num_slots=1024)).seconds < 1


def test_a_gpu_copies_what_it_lacks_or_lets_the_cpu_compute_it() -> None:
    rates = Rates.of(load_hardware_preset("l4"), value_bytes=2)
    on_gpu = LatencyModel(OLMOE, rates)
    copied = on_gpu.step(setup(num_host_slots=512))
    computed = on_gpu.step(setup(num_host_slots=512, computes_misses=True))
    assert copied.lanes[Lane.LINK] > 0 == computed.lanes[Lane.LINK]
    assert copied.host_hit_rate == 1
    assert on_gpu.step(setup(num_host_slots=0)).lanes[Lane.DISK] > 0


def test_a_prefill_reads_every_expert_once_unless_all_are_there() -> None:
    reads = OLMOE.expert_total_bytes / RATES.disk_bytes_per_second  # type: ignore[operator]
    some = model().prefill_seconds(setup(), 2000)
    every = model().prefill_seconds(setup(num_slots=1024), 2000)
    assert reads < every  # arithmetic takes longer here, and reads run beside it
    assert some == pytest.approx(every + 1024 * CPU_OVERHEADS.miss_seconds)
    few = model().prefill_seconds(setup(), 64)
    assert few > model().prefill_seconds(setup(num_slots=1024), 64)
    assert few >= reads * 0.99


def test_the_prior_is_what_was_simulated() -> None:
    oss = read_spec("gpt-oss-20b")
    for slots, lru in ((96, 0.453), (192, 0.629), (384, 0.902), (768, 1.0)):
        assert LRU_PRIOR.at(slots, oss, 1) == pytest.approx(lru, abs=1e-9)
        assert PLEC_PRIOR.at(slots, oss, 1) >= lru
    assert LRU_PRIOR.at(60, oss, 1) == 0  # fewer than a token meets between visits of a layer


@given(
    num_slots=st.integers(0, 2000), batch=st.integers(1, 500),
    name=st.sampled_from(["olmoe-1b-7b", "mixtral-8x7b", "deepseek-v3"]),
)  # fmt: skip
def test_hit_rates_are_shares(num_slots: int, batch: int, name: str) -> None:
    assert 0 <= LRU_PRIOR.at(num_slots, read_spec(name), batch) <= 1


def test_products_are_read_between_what_was_measured_and_slow_down_beyond() -> None:
    products = Products(rows=(1.0, 4.0), bytes_per_second=(10e9, 5e9))
    assert products.seconds(10e9, 1) == pytest.approx(1)
    assert products.seconds(10e9, 2.5) == pytest.approx(1.5)
    assert products.seconds(10e9, 8) == pytest.approx(4)
    assert products.flops(2) == pytest.approx(20e9)


def test_rates_without_products_come_from_plain_reads(tmp_path: Path) -> None:
    bare = replace(MACHINE, matmul=None)
    rates = Rates.of(bare, value_bytes=2)
    assert 0.5 < rates.linear.bytes_per_second[0] / rates.memory_bytes_per_second <= 1
    bare.save(tmp_path / "bare.yaml")
    assert Rates.of(Hardware.load(tmp_path / "bare.yaml"), value_bytes=2) == rates


def test_a_datasheet_gives_bandwidth_below_its_knee_and_arithmetic_beyond() -> None:
    rates = Rates.of(load_hardware_preset("h100"), value_bytes=2)
    assert rates.linear.flops(2) == pytest.approx(0.6 * 989.4e12, rel=1e-3)
    assert rates.linear.seconds(3350e9, 1) == pytest.approx(1 / 0.8)
