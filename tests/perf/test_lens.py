"""MoE-Lens' equations give the paper's numbers, and the second stage has the first as limit."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.errors import BudgetError
from moe_runtime.perf.lens import (
    LensMachine,
    LensModel,
    LensTask,
    effective_kv_share,
    intensity,
    parallelism_memory_efficiency,
    saturating_tokens,
    stage_one,
    stage_two,
)

# Mixtral-8x7B as the paper counts it: experts alone, 4 times those of a token; 128 KiB a token.
EXPERTS = {"parameters": 4.0, "active_parameters": 1.0}
MIXTRAL = LensModel(
    parameters=46.7e9, active_parameters=12.9e9, weight_bytes=94e9, kv_bytes_per_token=2**17
)
MACHINE = LensMachine(
    flops=150e12, link_bytes_per_second=19.5e9, kv_budget_bytes=70e9, kv_bytes_per_second=150e9
)
TASKS = [(98, 32), (98, 64), (98, 128), (98, 256), (926, 128), (128, 512)]


@pytest.mark.parametrize(
    ("teraflops", "tokens", "gigabytes_256", "gigabytes_512"),
    [(150, 19_200, 614, 1228), (181, 23_168, 741, 1482), (312, 39_936, 1277, 2555)],
)
def test_table_2_of_the_paper(
    teraflops: int, tokens: int, gigabytes_256: int, gigabytes_512: int
) -> None:
    """Its units are mixed: 1 TFLOP/s is 1024 GFLOP/s over 32 GB/s, 1 GB is 1000 MiB."""
    found = saturating_tokens(flops=teraflops * 1024e9, link_bytes_per_second=32e9, **EXPERTS)
    assert found == pytest.approx(tokens)
    assert int(found * 256 / 8 / 1000) == gigabytes_256
    assert int(found * 512 / 8 / 1000) == pytest.approx(gigabytes_512, abs=1)


def test_a_pass_with_saturating_tokens_has_the_machines_intensity() -> None:
    tokens = saturating_tokens(flops=150e12, link_bytes_per_second=32e9, **EXPERTS)
    assert intensity(tokens, **EXPERTS) == pytest.approx(150e12 / 32e9)


def test_equation_1_counts_attention_too() -> None:
    h, m, s, experts, active = 4096, 3.5, 4, 8, 2
    attention = 4 + 4 / s
    found = intensity(
        100,
        parameters=(6 * m * experts + attention) * h * h / 2,
        active_parameters=(6 * m * active + attention) * h * h / 2,
    )
    printed = 100 * (6 * active * h * m * h + 4 * h**2 + 4 * h**2 / s)
    printed /= 6 * experts * h * m * h + 4 * h**2 + 4 * h**2 / s
    assert found == pytest.approx(printed)
    assert found == pytest.approx(100 * active / experts, rel=0.1)


def test_parallelism_memory_efficiency_is_the_sum_it_stands_for() -> None:
    assert parallelism_memory_efficiency(98, 32) == pytest.approx(0.0356, abs=5e-5)
    for p, g in TASKS:
        exact = (p + g) / sum(p + j for j in range(g))
        assert parallelism_memory_efficiency(p, g) == pytest.approx(exact, rel=0.02)


def test_prefill_beside_decoding_makes_the_cache_look_larger() -> None:
    assert effective_kv_share(98, 256) == pytest.approx(1.57, abs=0.005)


@pytest.mark.parametrize(
    ("task", "total", "new"),
    list(
        zip(
            TASKS,
            (3948, 2157, 1207, 678, 921, 361),
            (972, 852, 684, 490, 112, 289),
            strict=True,
        )
    ),
)
def test_stage_one_for_the_papers_workloads(
    task: tuple[int, int], total: float, new: float
) -> None:
    found = stage_one(
        MIXTRAL, MACHINE, LensTask(prompt_tokens=task[0], new_tokens=task[1], num_sequences=1)
    )
    assert found.tokens_per_second == pytest.approx(total, rel=0.002)
    assert found.new_tokens_per_second == pytest.approx(new, rel=0.005)


@pytest.mark.parametrize(
    ("task", "total"), list(zip(TASKS, (3027, 1703, 994, 588, 890, 331), strict=True))
)
def test_stage_two_for_twenty_thousand_sequences(task: tuple[int, int], total: float) -> None:
    found = stage_two(
        MIXTRAL,
        replace(MACHINE, kv_bytes_per_second=1e15),
        LensTask(prompt_tokens=task[0], new_tokens=task[1], num_sequences=20_000),
        block_tokens=16,
        most_tokens_per_pass=1e9,
    )
    assert found.tokens_per_second == pytest.approx(total, rel=0.01)


@given(p=st.integers(1, 2000), g=st.integers(1, 2000), gigabytes=st.floats(10, 500))
def test_stage_two_converges_to_stage_one(p: int, g: int, gigabytes: float) -> None:
    machine = replace(
        MACHINE, kv_budget_bytes=gigabytes * 1e9, kv_bytes_per_second=1e18, flops=1e18
    )
    task = LensTask(prompt_tokens=p, new_tokens=g, num_sequences=10**12)
    one = stage_one(MIXTRAL, machine, task)
    two = stage_two(MIXTRAL, machine, task, block_tokens=1, most_tokens_per_pass=1e15)
    # A page of one token is half empty still.
    paged = (p + g / 2) / (p + g / 2 + 0.5)
    assert two.tokens_per_second == pytest.approx(one.tokens_per_second * paged, rel=1e-4)


@given(
    p=st.integers(1, 500), g=st.integers(1, 500), sequences=st.integers(1, 10**6),
    block=st.sampled_from([1, 16, 64]), most=st.floats(1, 1e6),
)  # fmt: skip
def test_stage_two_never_beats_stage_one(
    p: int, g: int, sequences: int, block: int, most: float
) -> None:
    task = LensTask(prompt_tokens=p, new_tokens=g, num_sequences=sequences)
    two = stage_two(MIXTRAL, MACHINE, task, block_tokens=block, most_tokens_per_pass=most)
    assert two.tokens_per_second <= stage_one(MIXTRAL, MACHINE, task).tokens_per_second * (1 + 1e-9)
    assert two.tokens_per_pass <= most * (1 + 1e-9)
    assert two.admitted_per_pass * g <= sequences * (1 + 1e-9)


def test_slow_memory_under_the_cache_makes_attention_the_limit() -> None:
    task = LensTask(prompt_tokens=926, new_tokens=128, num_sequences=20_000)
    slow = replace(MACHINE, kv_bytes_per_second=1e9)
    found = stage_two(MIXTRAL, slow, task, block_tokens=16, most_tokens_per_pass=1e9)
    assert found.pass_seconds == found.attention_seconds > 4.82


def test_a_cache_without_room_for_one_sequence_is_refused_with_what_would_do() -> None:
    task = LensTask(prompt_tokens=98, new_tokens=32, num_sequences=10)
    small = replace(MACHINE, kv_budget_bytes=100 * 2**17)
    with pytest.raises(BudgetError, match=rf"needs 144; give it {144 * 2**17} bytes or more"):
        stage_two(MIXTRAL, small, task, block_tokens=16, most_tokens_per_pass=1e9)
