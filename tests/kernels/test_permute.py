"""Pairs are sorted stably into padded blocks, and come back to their tokens weighted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.kernels.combine import combine
from moe_runtime.kernels.launch import UnsupportedKernelError
from moe_runtime.kernels.permute import SortedPairs, max_blocks, sort_pairs
from moe_runtime.kernels.reference import combine_reference, sort_pairs_reference

pytestmark = pytest.mark.usefixtures("poison")


def agrees(
    experts_TK: torch.Tensor,
    num_experts: int,
    block_rows: int,
    slots_E: torch.Tensor | None = None,
) -> SortedPairs:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    order = sort_pairs(
        experts_TK.to(device),
        num_experts=num_experts,
        block_rows=block_rows,
        slots_E=None if slots_E is None else slots_E.to(device),
    )
    pairs, rows, block_experts, counts = sort_pairs_reference(
        experts_TK, num_experts, block_rows, slots_E
    )
    assert order.counts_E.tolist() == counts
    assert order.rows_TK.flatten().tolist() == rows
    unused = [-1] * (order.pairs_R.numel() - len(pairs))
    assert order.pairs_R.tolist() == pairs + unused
    no_expert = [-1] * (order.block_experts_B.numel() - len(block_experts))
    assert order.block_experts_B.tolist() == block_experts + no_expert
    return order


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("block_rows", [1, 16])
@pytest.mark.parametrize(
    ("T", "K", "E"), [(0, 2, 4), (1, 1, 1), (1, 8, 20), (37, 4, 5), (70, 3, 30)]
)
def test_sorting_equals_its_reference(
    T: int, K: int, E: int, block_rows: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(T)
    agrees(torch.randint(0, E, (T, K), generator=generator, dtype=dtype), E, block_rows)


def test_many_chunks_are_counted_on_from_each_other() -> None:
    """More than one tile of the scan: 128 pairs a chunk, 16 chunks a tile."""
    experts_TK = torch.randint(0, 3, (1100, 2), generator=torch.Generator().manual_seed(0))
    agrees(experts_TK, 3, 64)


def test_the_example_of_the_docstring() -> None:
    order = agrees(torch.tensor([[2, 0], [2, 1]]), 3, 2)
    assert order.pairs_R.tolist() == [1, -1, 3, -1, 0, 2]
    assert order.rows_TK.tolist() == [[4, 0], [5, 2]]


@settings(max_examples=20)
@given(data=st.data())
def test_foreign_experts_and_experts_without_slots_are_dropped(data: st.DataObject) -> None:
    E = data.draw(st.integers(1, 9))
    K = data.draw(st.integers(1, 4))
    ids = st.integers(-2, E + 3)
    experts_TK = torch.tensor(
        data.draw(st.lists(st.lists(ids, min_size=K, max_size=K), min_size=1, max_size=60))
    )
    slots = data.draw(st.none() | st.lists(st.integers(-1, 3), min_size=E, max_size=E))
    slots_E = None if slots is None else torch.tensor(slots, dtype=torch.int32)
    agrees(experts_TK, E, data.draw(st.sampled_from([1, 2, 4, 16])), slots_E)


@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=30),
    block_rows=st.sampled_from([1, 4, 16]),
)
def test_no_routing_needs_more_blocks_than_are_there(counts: list[int], block_rows: int) -> None:
    needed = sum(-(-count // block_rows) for count in counts)
    assert needed <= max_blocks(sum(counts), len(counts), block_rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("T", "D"), [(1, 1), (5, 48), (3, 1030), (0, 8), (2, 0)])
def test_combining_equals_its_reference(
    T: int, D: int, dtype: torch.dtype, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(D)
    K, R = 3, 20
    y_RD = torch.randn(R, D, generator=generator).to(dtype)
    weights_TK = torch.rand(T, K, generator=generator)
    rows_TK = torch.randint(-1, R, (T, K), generator=generator, dtype=torch.int32)
    unused = [row for row in range(R) if row not in rows_TK]
    y_RD[unused] = float("nan")  # padding was never written
    out_TD = combine(y_RD.to(device), rows_TK.to(device), weights_TK.to(device))
    assert out_TD.dtype == dtype
    # One rounding to the output; the interpreter cuts bf16 off instead of rounding it.
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(
        out_TD.cpu().double(),
        combine_reference(y_RD, rows_TK, weights_TK),
        rtol=unit,
        atol=4 * torch.finfo(torch.float32).eps,
    )


def test_a_token_whose_pairs_were_all_dropped_is_zero(device: torch.device) -> None:
    nan_RD = torch.full((4, 6), float("nan"), device=device)
    rows_TK = torch.full((2, 3), -1, dtype=torch.int32, device=device)
    weights_TK = torch.full((2, 3), float("nan"), device=device)
    assert torch.equal(combine(nan_RD, rows_TK, weights_TK).cpu(), torch.zeros(2, 6))


def test_what_it_cannot_do_is_refused(device: torch.device) -> None:
    ids = torch.zeros(2, 2, dtype=torch.int32, device=device)
    for experts_TK, num_experts, block_rows, slots_E, complaint in [
        (ids, 4, 3, None, r"block_rows \(3\) must be a power of two from 1 to 256"),
        (ids, 4, 512, None, r"block_rows \(512\)"),
        (ids, 0, 16, None, r"num_experts \(0\) must be 1 to 4096"),
        (ids.float(), 4, 16, None, "experts_TK is torch.float32"),
        (ids[0], 4, 16, None, "experts_TK has shape"),
        (ids, 4, 16, ids[0], r"slots_E has shape \(2,\); expected: \(4\)"),
        (ids, 2, 16, ids[0].long(), "slots_E is torch.int64"),
    ]:
        with pytest.raises(UnsupportedKernelError, match=complaint):
            sort_pairs(experts_TK, num_experts=num_experts, block_rows=block_rows, slots_E=slots_E)
    with pytest.raises(UnsupportedKernelError, match="weights_TK has shape"):
        combine(torch.zeros(4, 4, device=device), ids, torch.zeros(2, 3, device=device))


def test_the_operators_are_sound(device: torch.device) -> None:
    ids = torch.tensor([[0, 2], [2, 1], [-1, 0]], device=device)
    slots_E = torch.tensor([1, -1, 0], dtype=torch.int32, device=device)
    # Rows of padding are fresh memory in real and poisoned in no two runs alike.
    torch.library.opcheck(torch.ops.moe_runtime.sort_pairs.default, (ids, slots_E, 3, 2))
    rows_TK = torch.tensor([[0, 1], [3, -1]], dtype=torch.int32, device=device)
    torch.library.opcheck(
        torch.ops.moe_runtime.combine.default,
        (torch.randn(4, 6, device=device), rows_TK, torch.rand(2, 2, device=device)),
    )
