"""Plain loops that say what each kernel computes: the truth of the tests."""

import math
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

# N rows and K columns of a weight; T tokens, K experts a token, E experts, S slots, R sorted rows
# of the CPU kernels: D model dim, F ffn dim, U rows of an up matrix


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


def cpu_experts_reference(
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


def route_reference(
    logits_TE: torch.Tensor,
    *,
    top_k: int,
    scoring: str,
    bias_E: torch.Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    group_score: str = "best",
    normalize: bool = False,
    scaling: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`topk.route`, one token and one choice at a time: weights and experts `[T, K]`."""
    T, E = logits_TE.shape
    weights_TK = torch.empty(T, top_k)
    experts_TK = torch.empty(T, top_k, dtype=torch.int32)
    group_size = E // num_groups
    for t in range(T):
        logits = logits_TE[t].float()
        score = {
            "softmax": logits.softmax(0),
            "sigmoid": logits.sigmoid(),
            "chosen_softmax": logits,
        }[scoring]
        choice = (score if bias_E is None else score + bias_E.float()).tolist()
        choice = [value if value == value else -math.inf for value in choice]  # NaN is last
        worth = {}
        for group in range(num_groups):
            members = sorted(choice[group * group_size : (group + 1) * group_size], reverse=True)
            worth[group] = members[0] if group_score == "best" else members[0] + members[1]
        kept = sorted(worth, key=lambda group: (-worth[group], group))[:top_groups]
        allowed = [e for e in range(E) if e // group_size in kept]
        chosen = sorted(allowed, key=lambda e: (-choice[e], e))[:top_k]
        weight = score[chosen]
        if scoring == "chosen_softmax":
            weight = weight.softmax(0)
        elif normalize:
            weight = weight / (weight.sum() + 1e-20)
        weights_TK[t] = weight * scaling
        experts_TK[t] = torch.tensor(chosen)
    return weights_TK, experts_TK


def sort_pairs_reference(
    experts_TK: torch.Tensor,
    num_experts: int,
    block_rows: int,
    slots_E: torch.Tensor | None = None,
) -> tuple[list[int], list[int], list[int], list[int]]:
    """`permute.sort_pairs`: (pair of each row, row of each pair, block's experts, counts).

    Only the rows and blocks that are used; the kernel's tensors have room for more.
    """
    experts = experts_TK.flatten().tolist()
    pairs: list[int] = []
    rows = [-1] * len(experts)
    block_experts: list[int] = []
    counts = []
    for expert in range(num_experts):
        has_slot = slots_E is None or int(slots_E[expert]) >= 0
        own = [pair for pair, found in enumerate(experts) if found == expert and has_slot]
        counts.append(len(own))
        for pair in own:
            rows[pair] = len(pairs)
            pairs.append(pair)
        while len(pairs) % block_rows:
            pairs.append(-1)
        block_experts += [expert] * -(-len(own) // block_rows)
    return pairs, rows, block_experts, counts


def experts_reference(
    x_TD: torch.Tensor,
    experts_TK: torch.Tensor,
    gate_up_SND: torch.Tensor,
    down_SDF: torch.Tensor,
    slots_E: torch.Tensor,
    *,
    activation: str,
    is_interleaved: bool = False,
    gate_up_bias_SN: torch.Tensor | None = None,
    down_bias_SD: torch.Tensor | None = None,
    alpha: float = 1.702,
    limit: float = 7.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`grouped_gemm.gate_up` and `down` in float64: h `[T, K, F]` and `W h` `[T, K, D]`.

    Pairs of an expert without a slot are NaN.
    """
    (T, K), (_, D, F) = experts_TK.shape, down_SDF.shape
    h_TKF = torch.full((T, K, F), math.nan, dtype=torch.float64)
    y_TKD = torch.full((T, K, D), math.nan, dtype=torch.float64)
    for t in range(T):
        for k in range(K):
            slot = int(slots_E[int(experts_TK[t, k])])
            if slot < 0:
                continue
            both = gate_up_SND[slot].double() @ x_TD[t].double()
            if gate_up_bias_SN is not None:
                both = both + gate_up_bias_SN[slot].double()
            gate, up = (both[0::2], both[1::2]) if is_interleaved else both.chunk(2)
            if activation == "clamped":
                gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
                h = gate * torch.sigmoid(alpha * gate) * (up + 1)
            elif activation == "gelu_tanh":
                h = functional.gelu(gate, approximate="tanh") * up
            else:
                h = functional.silu(gate) * up
            y = down_SDF[slot].double() @ h
            if down_bias_SD is not None:
                y = y + down_bias_SD[slot].double()
            h_TKF[t, k], y_TKD[t, k] = h, y
    return h_TKF, y_TKD


def combine_reference(
    y_RD: torch.Tensor, rows_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """`combine.combine` in float64, `[T, D]`."""
    T, K = rows_TK.shape
    out_TD = torch.zeros(T, y_RD.shape[1], dtype=torch.float64)
    for t in range(T):
        for k in range(K):
            row = int(rows_TK[t, k])
            if row >= 0:
                out_TD[t] += weights_TK[t, k].double() * y_RD[row].double()
    return out_TD


def dequantize_reference(
    values: torch.Tensor, scales: torch.Tensor, weight_format: str, group: int = 0
) -> torch.Tensor:
    """`dequant.dequantize` in float64, one number at a time."""
    S, N, K = values.shape
    K *= 2 if weight_format in ("int4", "mxfp4") else 1
    dense_SNK = torch.empty(S, N, K, dtype=torch.float64)
    e2m1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    plain = values.double() if weight_format in ("int8", "fp8") else values
    for s in range(S):
        for n in range(N):
            for k in range(K):
                if weight_format == "int8":
                    weight = float(plain[s, n, k]) * float(scales[s, n])
                elif weight_format == "fp8":
                    weight = float(plain[s, n, k]) * float(scales[s, n // 128, k // 128])
                else:
                    code = int(plain[s, n, k // 2]) >> 4 * (k % 2) & 15
                    if weight_format == "int4":
                        weight = (code - 8) * float(scales[s, n, k // group])
                    else:
                        power = int(scales[s, n, k // 32])
                        magnitude = e2m1[code & 7] * 2.0 ** (power - 127)
                        weight = math.nan if power == 255 else magnitude * (-1) ** (code >> 3)
                dense_SNK[s, n, k] = weight
    return dense_SNK


def quantize_fp8_reference(weights_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float8_e4m3fn `[N, K]` and float32 scales of its squares of 128: the largest becomes 448."""
    N, K = weights_NK.shape
    values_NK = torch.empty(N, K, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-N // 128), -(-K // 128))
    for n in range(0, N, 128):
        for k in range(0, K, 128):
            block = weights_NK[n : n + 128, k : k + 128].float()
            scale = max(float(block.abs().max()), 1e-12) / 448
            scales[n // 128, k // 128] = scale
            values_NK[n : n + 128, k : k + 128] = (block / scale).to(torch.float8_e4m3fn)
    return values_NK, scales


def quantize_mxfp4_reference(weights_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 codes `[N, K / 32, 16]` and uint8 scales `[N, K / 32]`, as OCP's section 6.3 has it.

    Example: 32 weights of which the largest is 5 get 2^(2 - 2), byte 127; 5 itself is as near to 4
    as to 6 and becomes 4, code 6.
    """
    N, K = weights_NK.shape
    groups = weights_NK.float().view(N, K // 32, 32)
    power = groups.abs().amax(-1).clamp(min=2.0**-125).log2().floor() - 2
    scaled = groups / power.exp2().unsqueeze(-1)
    e2m1 = torch.tensor((0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))
    codes = (scaled.abs().unsqueeze(-1) - e2m1).abs().argmin(-1) + 8 * scaled.signbit()
    blocks = codes[..., 0::2] + 16 * codes[..., 1::2]
    return blocks.to(torch.uint8), (power + 127).to(torch.uint8)


def pack_reference(weights_NK: torch.Tensor) -> torch.Tensor:
    """A block of bf16 weights for `unpack.unpack`, uint8, one weight at a time."""
    K = weights_NK.shape[1]
    words = [[word & 0xFFFF for word in row] for row in weights_NK.view(torch.int16).tolist()]
    counts = Counter(word >> 8 for row in words for word in row)
    table = [high for high, _ in counts.most_common(15)]
    rows, escapes, index = bytearray(), bytearray(), []
    for n, row in enumerate(words):
        if n % -(-4096 // K) == 0:
            index.append(len(escapes))
        whole = K // 128 * 128
        pieces = [
            [row[tile + p // 64 * 64 + p % 16 // 8 * 32 + p % 64 // 16 * 8 + p % 8]
             for p in range(128)]
            for tile in range(0, whole, 128)
        ]  # fmt: skip
        for piece in [*pieces, row[whole:]]:
            codes = []
            for word in piece:
                codes.append(table.index(word >> 8) if word >> 8 in table else 15)
                if codes[-1] == 15:
                    escapes.append(word >> 8)
            half = (len(piece) + 1) // 2
            rows += bytes(word & 255 for word in piece)
            second = codes[half:] + [0] * (len(piece) % 2)
            rows += bytes(low | high << 4 for low, high in zip(codes[:half], second, strict=True))
    header = bytes(32) + bytes(table).ljust(32, b"\0")
    starts = b"".join(start.to_bytes(4, "little") for start in [*index, len(escapes)])
    return torch.tensor(list(header + rows + starts + escapes), dtype=torch.uint8)
