"""The policy programme reproduces its authors' example, and no other policy beats it."""

from dataclasses import replace

import pytest

from moe_runtime.errors import BudgetError
from moe_runtime.perf.roofline import (
    RooflineMachine,
    RooflineModel,
    attainable_flops,
    find_policy,
    solve_policy,
    turning_points,
)

MIXTRAL = RooflineModel(
    num_layers=32, hidden_size=4096, expert_size=14336, num_heads=32, num_key_heads=8,
    num_experts=8, top_k=2,
)  # fmt: skip
L4 = RooflineMachine(
    gpu_memory_bytes=25769803776,
    cpu_memory_bytes=197880360960,
    link_bytes_per_second=17179869184,
    gpu_bytes_per_second=306016419840,
    cpu_bytes_per_second=81604378624,
    gpu_flops=104e12,
    cpu_flops=1.6e12,
)


def test_the_example_of_the_authors_comes_out() -> None:
    found = find_policy(MIXTRAL, L4, prompt_tokens=77, new_tokens=32)
    assert (found.micro_batch, found.num_micro_batches) == (324, 14)
    assert found.gpu_share == pytest.approx(0.055884688, rel=1e-5)
    assert found.link_seconds == pytest.approx(0.1549, abs=5e-5)
    assert found.tokens_per_second == pytest.approx(944.66, rel=1e-3)


@pytest.mark.parametrize(("new_tokens", "batches"), [(64, (228, 16)), (128, (164, 16))])
def test_longer_texts_take_the_published_batches(new_tokens: int, batches: tuple[int, int]) -> None:
    found = find_policy(MIXTRAL, L4, prompt_tokens=77, new_tokens=new_tokens)
    assert (found.micro_batch, found.num_micro_batches) == batches


def test_no_number_of_micro_batches_is_better_than_the_one_found() -> None:
    found = find_policy(MIXTRAL, L4, prompt_tokens=77, new_tokens=256)
    for number in range(1, found.num_micro_batches + 3):
        other = solve_policy(
            MIXTRAL, L4, found.micro_batch, number, prompt_tokens=77, new_tokens=256
        )
        if other is not None:
            assert other.tokens_per_second <= found.tokens_per_second * (1 + 1e-9)


def test_a_layer_takes_as_long_as_its_slowest_lane() -> None:
    found = find_policy(MIXTRAL, L4, prompt_tokens=77, new_tokens=128)
    lanes = (found.link_seconds, found.gpu_seconds, found.cpu_seconds)
    assert found.layer_seconds == pytest.approx(max(lanes))


def test_more_cpu_memory_never_costs_throughput() -> None:
    large = replace(L4, cpu_memory_bytes=2 * L4.cpu_memory_bytes)
    less = find_policy(MIXTRAL, L4, prompt_tokens=77, new_tokens=32)
    more = find_policy(MIXTRAL, large, prompt_tokens=77, new_tokens=32)
    assert more.tokens_per_second >= less.tokens_per_second


def test_a_machine_without_room_is_refused_with_what_would_do() -> None:
    small = replace(L4, cpu_memory_bytes=50e9)
    with pytest.raises(BudgetError, match="give the CPU 112742891520 bytes or more"):
        find_policy(MIXTRAL, small, prompt_tokens=77, new_tokens=32)


def test_the_roof_is_the_lowest_level_and_the_points_are_where_levels_meet() -> None:
    low, high = turning_points(L4, cpu_intensity=1, gpu_intensity=100)
    assert low == pytest.approx(L4.cpu_bytes_per_second / L4.link_bytes_per_second)
    assert attainable_flops(L4, link_intensity=high, gpu_intensity=100) == pytest.approx(
        L4.gpu_bytes_per_second * 100
    )
    assert attainable_flops(L4, link_intensity=high / 2, gpu_intensity=100) == pytest.approx(
        L4.gpu_bytes_per_second * 50
    )
    assert attainable_flops(L4, link_intensity=1e9, gpu_intensity=1e9) == L4.gpu_flops
