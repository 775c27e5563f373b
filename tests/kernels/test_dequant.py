"""Quantised weights become the numbers that their formats define."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from moe_runtime.kernels.dequant import TritonDequantizer, dequantize, dequantize_into
from moe_runtime.kernels.launch import UnsupportedKernelError
from moe_runtime.kernels.scaled_blocks import ScaledWeights, TorchDequantizer
from moe_runtime.kernels.slot_weights import SlotWeights
from tests.kernels.quantised import apart, moved, random_weights, weights_in_parts

pytestmark = pytest.mark.usefixtures("poison")
# N and K: ragged against tiles of 32 x 128 and against squares of 128; odd where a format can be.
SHAPES = {
    "int8": [(1, 1), (33, 131), (64, 256)],
    "fp8": [(1, 1), (33, 131), (129, 257)],
    "int4": [(1, 32), (33, 160), (32, 256)],
    "mxfp4": [(1, 32), (33, 160), (32, 256)],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("weight_format", "N", "K"),
    [(name, *shape) for name, shapes in SHAPES.items() for shape in shapes],
)
def test_every_format_equals_its_reference(
    weight_format: Any, N: int, K: int, dtype: torch.dtype, device: torch.device
) -> None:
    weights, expected_SNK = random_weights(weight_format, 2, N, K)
    dense_SNK = dequantize(moved(weights, device), dtype)
    assert dense_SNK.shape == (2, N, K)
    assert dense_SNK.dtype == dtype
    # Products of a float32 scale round once, then once more to dtype (bf16 is cut in the
    # interpreter).
    torch.testing.assert_close(
        dense_SNK.cpu().double(),
        expected_SNK,
        rtol=1.01 * torch.finfo(dtype).eps,
        atol=0 if dtype != torch.float16 else 2.0**-24,
    )


@pytest.mark.parametrize("weight_format", ["int8", "fp8", "int4", "mxfp4"])
def test_parts_that_lie_apart(weight_format: Any, device: torch.device) -> None:
    """Law: the rows of the second follow those of the first, scaled by its own scales."""
    weights, expected_SNK = weights_in_parts(
        weight_format, 2, 33 if weight_format != "fp8" else 130, 160
    )
    dense_SNK = dequantize(apart(weights, device), torch.float32)
    torch.testing.assert_close(dense_SNK.cpu().double(), expected_SNK, rtol=2e-7, atol=0)


@pytest.mark.parametrize("weight_format", ["fp8", "mxfp4"])
def test_a_target_of_any_strides(weight_format: Any, device: torch.device) -> None:
    """Law: a transposed part of a larger matrix is written, and nothing beside it."""
    weights, _ = random_weights(weight_format, 1, 33, 160)
    weights = moved(weights, device)
    room = torch.full((1, 160, 50), 7.0, device=device)
    dequantize_into(weights, room[..., 10:43].mT)
    assert torch.equal(room[..., 10:43].mT, dequantize(weights, torch.float32))
    assert (room[..., :10] == 7).all()
    assert (room[..., 43:] == 7).all()


@pytest.mark.parametrize("weight_format", ["fp8", "mxfp4"])
def test_the_dequantizer_is_torchs_in_every_bit(weight_format: Any, device: torch.device) -> None:
    """Law: of one weight, into a transposed view; float32, as the interpreter cuts bf16 off."""
    slots, _ = random_weights(weight_format, 1, 130, 160)
    assert slots.scales is not None
    weights = ScaledWeights(
        format=weight_format, values=slots.values[0].to(device), scales=slots.scales[0].to(device)
    )
    found, expected = (torch.empty(160, 130, device=device) for _ in range(2))
    TritonDequantizer().run(weights, found.mT)
    TorchDequantizer().run(weights, expected.mT)
    assert torch.equal(found, expected)


def test_every_code_of_mxfp4_and_every_power() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    values = codes.repeat(256, 1)[None]  # every pair of codes under every scale
    scales = torch.arange(256, dtype=torch.int32).to(torch.uint8)[None, :, None].repeat(1, 1, 16)
    weights = SlotWeights(values=values, scales=scales, format="mxfp4")
    dense_NK = dequantize(moved(weights, device), torch.float32).cpu()[0]
    e2m1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    e2m1 = torch.cat([e2m1, -e2m1])
    numbers_K = torch.stack([e2m1[codes.int() & 15], e2m1[codes.int() >> 4]], dim=1).flatten()
    powers_N = torch.exp2(torch.arange(256).double() - 127)
    expected_NK = (numbers_K.double() * powers_N[:, None]).float()  # above float32: infinite
    expected_NK[255] = float("nan")
    torch.testing.assert_close(dense_NK, expected_NK, rtol=0, atol=0, equal_nan=True)


def test_every_finite_fp8_number() -> None:
    """NaN is left to a GPU: the interpreter reads it as 480."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    codes = codes[(codes & 127) != 127].view(torch.float8_e4m3fn)[None, None]
    weights = SlotWeights(values=codes, scales=torch.ones(1, 1, 2), format="fp8")
    dense = dequantize(moved(weights, device), torch.float32).cpu()
    assert torch.equal(dense, codes.float())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_nan_of_fp8_stays_one() -> None:
    codes = torch.tensor([[[127, 255, 0, 1]]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    weights = SlotWeights(values=codes, scales=torch.ones(1, 1, 1), format="fp8")
    dense = dequantize(moved(weights, torch.device("cuda")), torch.float32)
    assert dense.isnan().flatten().tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    ("weight_format", "change", "complaint"),
    [
        ("int8", {"format": "int3"}, "format is 'int3'; supported: plain, int8, fp8, int4, mxfp4"),
        ("int8", {"scales": None}, "scales are missing: int8 weights need them"),
        ("int8", {"scales": torch.ones(2, 3)}, r"scales has shape \(2, 3\); expected: \(2, 8\)"),
        (
            "int8",
            {"values": torch.ones(2, 8, 64)},
            "values is torch.float32; supported: torch.int8",
        ),
        ("int4", {"group": 24}, "group is 24; supported: 16, 32, 64, 128"),
        ("int4", {"group": 128}, "64 columns, which must be divisible by the group"),
        (
            "mxfp4",
            {"scales": torch.ones(2, 8, 2)},
            "scales is torch.float32; supported: torch.uint8",
        ),
        ("fp8", {"values": torch.ones(8, 64)}, "values has shape"),
        ("fp8", {"bias": torch.ones(2, 9)}, None),
    ],
    ids=str,
)
def test_what_is_malformed_is_refused(
    weight_format: Any, change: dict[str, Any], complaint: str | None, device: torch.device
) -> None:
    weights, _ = random_weights(weight_format, 2, 8, 64)
    if complaint is None:  # a bias is none of dequantize's business
        dequantize(moved(replace(weights, **change), device), torch.float32)
        return
    with pytest.raises(UnsupportedKernelError, match=complaint):
        dequantize(replace(weights, **change), torch.float32)


def test_plain_weights_and_other_outputs_are_refused(device: torch.device) -> None:
    plain, _ = random_weights("plain", 2, 8, 64)
    with pytest.raises(UnsupportedKernelError, match="use them as they are"):
        dequantize(moved(plain, device), torch.float32)
    weights, _ = random_weights("int8", 2, 8, 64)
    with pytest.raises(UnsupportedKernelError, match=r"dense_SNK is torch\.int8"):
        dequantize(moved(weights, device), torch.int8)


@pytest.mark.parametrize("weight_format", ["int8", "int4", "mxfp4"])
def test_the_operator_is_sound(weight_format: Any, device: torch.device) -> None:
    """Not for fp8, as opcheck compares inputs, which torch does not do for fp8 on the CPU."""
    weights, _ = random_weights(weight_format, 2, 4, 32)
    torch.library.opcheck(
        torch.ops.moe_runtime.dequantize.default,
        (
            weights.values.to(device),
            weights.scales.to(device),
            weight_format,
            weights.group,
            torch.empty(2, 4, 32, dtype=torch.float16, device=device),
        ),
    )
