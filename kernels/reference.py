"""Plain loops that say what each kernel computes: the truth of the tests."""

import torch

# N rows and K columns of a weight


def bf16_gemv_reference(w_NK: torch.Tensor, x_K: torch.Tensor, k_block: int) -> torch.Tensor:
    """`W x` as VDPBF16PS sums it, `[N]` bf16; numbers below 2^-126 are not flushed here.

    Example with k_block = 4 and products p0 .. p5 of one row: ((p1 + p0) + p3) + p2 in float32,
    plus p5 + p4, rounded to bf16: of each pair the odd product is added first.
    """
    p_NK = w_NK.float() * x_K.float()  # exact: 8 bits times 8 bits
    total_N = torch.zeros(len(w_NK))
    for begin in range(0, p_NK.shape[1], k_block):
        block_NK = p_NK[:, begin : begin + k_block]
        sum_N = torch.zeros(len(w_NK))
        for k in range(0, block_NK.shape[1], 2):
            for product_N in reversed(block_NK[:, k : k + 2].unbind(1)):
                sum_N = sum_N + product_N
        total_N = total_N + sum_N
    return total_N.bfloat16()
