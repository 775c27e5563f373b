"""Packed blocks give back every bit of bf16 weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.kernels.launch import UnsupportedKernelError
from moe_runtime.kernels.reference import pack_reference
from moe_runtime.kernels.unpack import group_rows, row_bytes, unpack, unpack_into

pytestmark = pytest.mark.usefixtures("poison")


def packed(weights_NK: torch.Tensor, rows_per_block: int) -> torch.Tensor:
    """Blocks of one length; what follows a block's escapes is not zero."""
    blocks = [pack_reference(part) for part in weights_NK.split(rows_per_block)]
    length = -(-max(block.numel() for block in blocks) // 64) * 64
    blocks_PB = torch.full((len(blocks), length), 0xA5, dtype=torch.uint8)
    for row, block in zip(blocks_PB, blocks, strict=True):
        row[: block.numel()] = block
    return blocks_PB


def comes_back(weights_NK: torch.Tensor, rows_per_block: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    blocks_PB = packed(weights_NK, rows_per_block).to(device)
    found_NK = unpack(blocks_PB, *weights_NK.shape, rows_per_block)
    assert found_NK.dtype == torch.bfloat16
    assert torch.equal(found_NK.cpu().view(torch.int16), weights_NK.view(torch.int16))


@pytest.mark.parametrize("K", [65536, 1024, 1000])
def test_all_patterns_come_back(K: int) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    shuffled = every[torch.randperm(65536, generator=torch.Generator().manual_seed(0))]
    comes_back(shuffled[: 65536 // K * K].view(-1, K), rows_per_block=48)


@pytest.mark.parametrize(
    ("N", "K", "rows_per_block"), [(1, 1, 1), (5, 127, 2), (3, 128, 3), (9, 1537, 4), (70, 130, 64)]
)
def test_any_shape_comes_back(N: int, K: int, rows_per_block: int) -> None:
    """Tails of all kinds, groups and blocks that are not full."""
    weights_NK = torch.randn(N, K, generator=torch.Generator().manual_seed(K)).bfloat16()
    comes_back(weights_NK, rows_per_block)


@settings(max_examples=20)
@given(data=st.data())
def test_adversarial_weights_come_back(data: st.DataObject) -> None:
    K = data.draw(st.integers(1, 140))
    seeds = data.draw(st.lists(st.integers(-(2**15), 2**15 - 1), min_size=1, max_size=40))
    N = data.draw(st.integers(1, 5))
    words = torch.tensor(seeds, dtype=torch.int16).repeat(-(-N * K // len(seeds)))[: N * K]
    comes_back(words.view(N, K).view(torch.bfloat16), data.draw(st.integers(1, 5)))


def test_a_target_that_is_part_of_a_slot(device: torch.device) -> None:
    """Law: weights go where they are wanted, and nowhere else."""
    weights_NK = torch.randn(6, 130, generator=torch.Generator().manual_seed(0)).bfloat16()
    slot = torch.zeros(8, 130, dtype=torch.bfloat16, device=device)
    unpack_into(packed(weights_NK, 4).to(device), slot[1:7], 4)
    assert torch.equal(slot[1:7].cpu(), weights_NK)
    assert not slot[[0, 7]].any()
    with pytest.raises(
        UnsupportedKernelError, match=r"weights_NK has strides \(260, 1\): pass cont"
    ):
        unpack_into(packed(weights_NK, 4).to(device), slot.view(4, 260)[:, :130], 4)


def test_what_is_malformed_is_refused(device: torch.device) -> None:
    blocks_PB = packed(torch.ones(4, 130).bfloat16(), 2).to(device)
    for blocks, N, K, rows_per_block, complaint in [
        (blocks_PB, 4, 0, 2, r"K \(0\) and rows_per_block \(2\) must be positive"),
        (blocks_PB, 5, 130, 2, r"blocks_PB has shape .* expected: \(3, any\)"),
        (blocks_PB, 4, 4096, 2, r"2 rows of 4096 weights take \d+ or more"),
        (blocks_PB.int(), 4, 130, 2, "blocks_PB is torch.int32; supported: torch.uint8"),
    ]:
        with pytest.raises(UnsupportedKernelError, match=complaint):
            unpack(blocks, N, K, rows_per_block)


def test_a_damaged_index_reads_nothing_outside(device: torch.device) -> None:
    N, K = 2, 4096
    weights_NK = torch.arange(N * K, dtype=torch.int32).to(torch.int16).view(N, K)
    blocks_PB = packed(weights_NK.view(torch.bfloat16), N)
    index = 64 + N * row_bytes(K)
    assert group_rows(K) == 1
    for start in (2**31 - 1, 2**32 - 1, 2**31):
        blocks_PB[0, index : index + 4] = torch.tensor(
            list(start.to_bytes(4, "little")), dtype=torch.uint8
        )
        found_NK = unpack(blocks_PB.to(device), N, K, N).cpu().view(torch.int16)
        assert torch.equal(found_NK[1], weights_NK[1])  # the other group is whole
        assert torch.equal(found_NK[0] & 0xFF, weights_NK[0] & 0xFF)


def test_the_operator_is_sound(device: torch.device) -> None:
    blocks_PB = packed(torch.randn(3, 20).bfloat16(), 2).to(device)
    weights_NK = torch.empty(3, 20, dtype=torch.bfloat16, device=device)
    torch.library.opcheck(torch.ops.moe_runtime.unpack.default, (blocks_PB, weights_NK, 2))
