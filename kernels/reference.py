"""Plain loops that say what each kernel computes: the truth of the tests."""

from collections.abc import Callable, Sequence

import torch

# N rows and K columns of a weight
# T tokens, D model dim, F ffn dim, U rows of an up matrix, R rows: (token, expert) pairs by expert


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


def unpack_reference(block: torch.Tensor, N: int, K: int) -> torch.Tensor:
    """The bf16 weights `[N, K]` of a block of `packed_blocks.py`, one by one.

    Example, a tail of three weights with low bytes 80 00 C0, codes 1 0 / 15 in nibbles (F0 + 1 and
    0), high bytes 3F BF ... and the escape 00: codes run 1, 0 in low nibbles, then 15 in the first
    high one, so the weights are BF80, 3F00 and 00C0: -1.0, 0.5 and a denormal.
    """
    raw = bytes(block.tolist())
    high, at, found = raw[32:48], 64, []
    row_bytes = K // 128 * 192 + K % 128 + (K % 128 + 1) // 2
    num_groups = -(-N // -(-4096 // K))
    escapes = iter(raw[64 + N * row_bytes + 4 * (num_groups + 1) :])

    def weight(low: int, code: int) -> int:
        return (next(escapes) if code == 15 else high[code]) << 8 | low

    for _ in range(N):
        row = [0] * K
        for tile in range(0, K - 127, 128):
            for p in range(128):
                code = raw[at + 128 + p % 64] >> p // 64 * 4 & 15
                place = p // 64 * 64 + p % 16 // 8 * 32 + p % 64 // 16 * 8 + p % 8
                row[tile + place] = weight(raw[at + p], code)
            at += 192
        tail = K % 128
        half = (tail + 1) // 2
        for i in range(tail):
            code = raw[at + tail + i] & 15 if i < half else raw[at + tail + i - half] >> 4
            row[K - tail + i] = weight(raw[at + i], code)
        at += tail + half
        found.append([word - 65536 if word >= 32768 else word for word in row])
    return torch.tensor(found, dtype=torch.int16).view(torch.bfloat16)


def experts_reference(
    x_TD: torch.Tensor,
    up: Sequence[torch.Tensor],
    down: Sequence[torch.Tensor],
    rows: Sequence[tuple[int, int]],
    token_R: torch.Tensor,
    weight_R: torch.Tensor,
    gate: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """`[T, D]` float64: each token's experts, weighted and added up, with nothing rounded.

    Expert e has `up[e] [U, D]`, `down[e] [D, F]` and the rows `rows[e]` (begin, end); `gate` maps
    `[U]` to `[F]`. Example with one expert of U = F = 1, up 3, down 2, gate relu, weight 0.5: x = 4
    gives 0.5 * 2 * relu(3 * 4) = 12.
    """
    out_TD = torch.zeros(x_TD.shape, dtype=torch.float64)
    for w_up, w_down, (begin, end) in zip(up, down, rows, strict=True):
        for row in range(begin, end):
            token = int(token_R[row])
            h_F = gate(w_up.double() @ x_TD[token].double())
            out_TD[token] += float(weight_R[row]) * (w_down.double() @ h_F)
    return out_TD
