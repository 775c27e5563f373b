"""bfloat16 rows as int8 or int4 ones, symmetric and rounded to the nearest, by torch."""

from typing import Literal, get_args

import torch

# N rows and K columns

QuantisedDtype = Literal["int8", "int4"]
QUANTISED_DTYPES: tuple[str, ...] = get_args(QuantisedDtype)
INT4_GROUP = 32  # weights of a row that share a scale


def quantise(w_NK: torch.Tensor, dtype: QuantisedDtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and scales as `slot_weights.py` has them, of one slot.

    int8: `[N, K]` and float32 `[N]`, the greatest magnitude of the row over 127. int4: uint8
    `[N, K / 2]` and bfloat16 `[N, K / 32]`, the greatest of the group over 7. Values are quotients,
    half to even. What is not finite makes its scale NaN, so that it shows. Example, int8: the row
    (1, -0.5) has scale 1 / 127 and values 127 and -64 (-63.5).
    """
    N, K = w_NK.shape
    group = K if dtype == "int8" else INT4_GROUP
    wide_NGk = w_NK.float().view(N, -1, group)
    largest_NG = wide_NGk.abs().amax(2)
    scales_NG = largest_NG / (127 if dtype == "int8" else 7)
    if dtype == "int4":
        scales_NG = scales_NG.bfloat16().float()
    codes_NGk = (wide_NGk / scales_NG.unsqueeze(2)).round().nan_to_num(0.0)  # 0 / 0 of zeros
    scales_NG = torch.where(largest_NG.isfinite(), scales_NG, torch.nan)
    if dtype == "int8":
        return codes_NGk.clamp(-127, 127).view(N, K).to(torch.int8), scales_NG.view(N)
    codes_NK = (codes_NGk.clamp(-7, 7) + 8).to(torch.uint8).view(N, K)
    return codes_NK[:, ::2] | codes_NK[:, 1::2] << 4, scales_NG.bfloat16()


def dequantise(
    values: torch.Tensor, scales: torch.Tensor, dtype: QuantisedDtype, out_NK: torch.Tensor
) -> None:
    """The weights of one slot, rounded to the dtype of `out_NK`."""
    if dtype == "int8":
        out_NK.copy_(values.float() * scales.unsqueeze(1))
        return
    N, K = out_NK.shape
    codes_NK = torch.stack([values & 15, values >> 4], 2).view(N, K)
    wide_NGk = (codes_NK.float() - 8).view(N, -1, INT4_GROUP) * scales.float().unsqueeze(2)
    out_NK.copy_(wide_NGk.view(N, K))
