"""Weights in blocks that share a scale, as checkpoints store them, and torch's way to read them.

fp8 is DeepSeek-V3's (arXiv:2412.19437, section 3.3.2): e4m3 numbers, and a float32 scale for each
square of 128 x 128, which at the edges of a matrix may be cut. mxfp4 is that of the OCP
microscaling formats 1.0 (section 5.1), as gpt-oss ships it: e2m1 numbers, two in a byte, the even
column in the low half, and a scale 2^(byte - 127) for every 32 of a row; the byte 255 is NaN.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch

# N rows and K columns of a weight, C bytes of a stored row

ScaledFormat = Literal["fp8", "mxfp4"]

FP8_BLOCK = 128  # side of the squares
MXFP4_GROUP = 32  # weights of a row
MXFP4_NAN = 255

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Rows computed together: what torch needs beside the result stays small whatever the matrix.
_CHUNK_ELEMENTS = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaledWeights:
    """One weight `[N, K]`.

    fp8: `values` float8_e4m3fn `[N, K]`, `scales` floating `[ceil(N / 128), ceil(K / 128)]`.
    mxfp4: `values` uint8 `[N, K / 2]`, `scales` uint8 `[N, K / 32]`.
    """

    format: ScaledFormat
    values: torch.Tensor
    scales: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        N, C = self.values.shape
        return N, C * 2 if self.format == "mxfp4" else C

    def check(self, dense_NK: torch.Tensor) -> None:
        """Raise ValueError unless scales and `dense_NK` have the shapes that `values` ask for."""
        N, K = self.shape
        if self.format == "mxfp4":
            expected = (N, K // MXFP4_GROUP) if K % MXFP4_GROUP == 0 else None
        else:
            expected = (-(-N // FP8_BLOCK), -(-K // FP8_BLOCK))
        if self.scales.shape != expected or dense_NK.shape != (N, K):
            raise ValueError(
                f"{self.format} values of {N} x {K} weights have scales of shape "
                f"{tuple(self.scales.shape)} and a result of shape {tuple(dense_NK.shape)}; they "
                f"need {expected or f'columns that {MXFP4_GROUP} divides'} and {(N, K)}"
            )

    @property
    def is_sound(self) -> bool:
        """Whether every scale is a number."""
        if self.format == "mxfp4":
            return self.scales.numel() == 0 or int(self.scales.max()) < MXFP4_NAN
        return bool(self.scales.isfinite().all())


class Dequantizer(Protocol):
    """Turns stored weights into ordinary ones; implementations agree in every bit but NaN's."""

    def run(self, weights: ScaledWeights, dense_NK: torch.Tensor) -> None:
        """Write each weight, computed in float32 and rounded once, to `dense_NK`.

        That is a view of any strides: one that is stored transposed is passed as `.mT`.
        """


class TorchDequantizer:
    """`Dequantizer` on any device, a few rows at a time."""

    def run(self, weights: ScaledWeights, dense_NK: torch.Tensor) -> None:
        weights.check(dense_NK)
        N, K = weights.shape
        rows = max(_CHUNK_ELEMENTS // max(K, 1) // FP8_BLOCK, 1) * FP8_BLOCK
        for begin in range(0, N, rows):
            part = slice(begin, min(begin + rows, N))
            if weights.format == "fp8":
                blocks = slice(begin // FP8_BLOCK, -(-part.stop // FP8_BLOCK))
                values = _fp8(weights.values[part], weights.scales[blocks])
            else:
                values = _mxfp4(weights.values[part], weights.scales[part])
            dense_NK[part].copy_(values)


def _fp8(values_NK: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Float32 `[N, K]`, N counted from the border of a block."""
    N, K = values_NK.shape
    spread = scales.float().repeat_interleave(FP8_BLOCK, 0)[:N]
    return values_NK.float().mul_(spread.repeat_interleave(FP8_BLOCK, 1)[:, :K])


def _mxfp4(codes_NC: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Float32 `[N, K]`."""
    N, C = codes_NC.shape
    numbers = torch.tensor((*_E2M1, *(-value for value in _E2M1)), device=codes_NC.device)
    both = torch.stack((codes_NC & 15, codes_NC >> 4), dim=-1).view(N, 2 * C)
    values_NGk = numbers[both.int()].view(N, -1, MXFP4_GROUP)
    return values_NGk.mul_(_power_of_two(scales).unsqueeze(-1)).view(N, 2 * C)


def _power_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """`2^(byte - 127)` by the bits of a float32: exact also where it is subnormal."""
    bits = exponents.to(torch.int32) << 23
    bits = torch.where(exponents == 0, 1 << 22, bits)
    bits = torch.where(exponents == MXFP4_NAN, 0x7FC00000, bits)
    return bits.view(torch.float32)
