"""bfloat16 rows as int8 or int4 ones, symmetric and rounded to the nearest, by torch."""

from typing import Literal, get_args

import torch
from torch.nn import functional

# N rows and K columns

QuantisedDtype = Literal["int8", "int4"]
QUANTISED_DTYPES: tuple[str, ...] = get_args(QuantisedDtype)
INT4_GROUP = 32  # weights of a row that share a scale


def int4_groups(K: int) -> int:
    """Groups of a row of K weights; the last may be shorter."""
    return -(-K // INT4_GROUP)


def quantise(w_NK: torch.Tensor, dtype: QuantisedDtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and scales as `slot_weights.py` has them, of one slot.

    int8: `[N, K]` and float32 `[N]`, the greatest magnitude of the row over 127. int4: uint8
    `[N, K / 2]` and bfloat16 `[N, ceil(K / 32)]`, the greatest of the group over 7. Values are
    quotients, half to even. What is not finite makes its scale NaN, so that it shows. Example,
    int8: the row (1, -0.5) has scale 1 / 127 and values 127 and -64 (-63.5).
    """
    N, K = w_NK.shape
    if dtype == "int8":
        codes_N1K, scales_N1 = _quotients(w_NK.float().unsqueeze(1), 127)
        return codes_N1K.view(N, K).to(torch.int8), scales_N1.view(N)
    wide_NK = functional.pad(w_NK.float(), (0, -K % INT4_GROUP))
    codes_NGk, scales_NG = _quotients(wide_NK.view(N, -1, INT4_GROUP), 7, torch.bfloat16)
    codes_NK = (codes_NGk + 8).to(torch.uint8).view(N, -1)[:, :K]
    return codes_NK[:, ::2] | codes_NK[:, 1::2] << 4, scales_NG.bfloat16()


def _quotients(
    w_NGk: torch.Tensor, most: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers up to `most`, and a scale of `dtype` for each group."""
    largest_NG = w_NGk.abs().amax(2)
    scales_NG = (largest_NG / most).to(dtype).float()
    codes_NGk = (w_NGk / scales_NG.unsqueeze(2)).round().nan_to_num(0.0)  # 0 / 0 of zeros
    return codes_NGk.clamp(-most, most), torch.where(largest_NG.isfinite(), scales_NG, torch.nan)


def dequantise(
    values: torch.Tensor, scales: torch.Tensor, dtype: QuantisedDtype, out_NK: torch.Tensor
) -> None:
    """The weights of one slot, rounded to the dtype of `out_NK`."""
    if dtype == "int8":
        out_NK.copy_(values.float() * scales.unsqueeze(1))
        return
    N, K = out_NK.shape
    codes_NK = torch.stack([values & 15, values >> 4], 2).view(N, K)
    scales_NK = scales.float().repeat_interleave(INT4_GROUP, dim=1)[:, :K]
    out_NK.copy_((codes_NK.float() - 8) * scales_NK)
