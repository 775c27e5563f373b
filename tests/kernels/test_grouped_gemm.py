"""The grouped product equals loops in float64, whatever the shapes, slots and weight formats."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from moe_runtime.kernels.combine import combine
from moe_runtime.kernels.gate import Gate
from moe_runtime.kernels.grouped_gemm import down, gate_up
from moe_runtime.kernels.launch import UnsupportedKernelError
from moe_runtime.kernels.permute import sort_pairs
from moe_runtime.kernels.reference import combine_reference, experts_reference
from moe_runtime.kernels.slot_weights import SlotWeights
from moe_runtime.kernels.tile_settings import TileSettings
from tests.kernels.quantised import apart, in_slab, moved, random_weights, weights_in_parts

pytestmark = pytest.mark.usefixtures("poison")
ROWS = TileSettings(block_outputs=32, block_inputs=64, num_warps=4, num_stages=2, group_blocks=1)
TILES = TileSettings(block_outputs=32, block_inputs=64, num_warps=4, num_stages=2, group_blocks=3)


def assert_near(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Sums of hundreds of rounded terms, of which the largest outputs show the size.

    Inputs of the second product are rounded to dtype, so an output carries the mean of their
    errors. The interpreter cuts bf16 off: twice as far as rounding, and always downwards.
    """
    error = 4 * torch.finfo(dtype).eps
    size = float(torch.nan_to_num(expected).abs().amax()) if expected.numel() else 0.0
    torch.testing.assert_close(
        found.double(), expected, rtol=error, atol=error * size, equal_nan=True
    )


def check_layer(
    device: torch.device,
    gate_up_weights: SlotWeights,
    gate_up_SND: torch.Tensor,
    down_weights: SlotWeights,
    down_SDF: torch.Tensor,
    *,
    T: int = 7,
    K: int = 2,
    slots: list[int],
    block_rows: int,
    dtype: torch.dtype = torch.float32,
    gate: Gate | None = None,
    experts_TK: torch.Tensor | None = None,
    settings: TileSettings | None = None,
    place: Any = moved,
) -> None:
    """A whole layer, routed at random, against the reference."""
    gate = gate or Gate()
    settings = settings or (ROWS if block_rows < 16 else TILES)
    generator = torch.Generator().manual_seed(T)
    E = len(slots)
    x_TD = torch.randn(T, gate_up_SND.shape[2], generator=generator).to(dtype)
    if experts_TK is None:
        experts_TK = (
            torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(T)])
            if T
            else torch.zeros(0, K, dtype=torch.int64)
        )
    weights_TK = torch.rand(experts_TK.shape, generator=generator)
    slots_E = torch.tensor(slots, dtype=torch.int32)
    expected_TKF, expected_TKD = experts_reference(
        x_TD,
        experts_TK,
        gate_up_SND,
        down_SDF,
        slots_E,
        activation=gate.activation,
        is_interleaved=gate.is_interleaved,
        gate_up_bias_SN=gate_up_weights.bias,
        down_bias_SD=down_weights.bias,
        alpha=gate.alpha,
        limit=gate.limit,
    )
    order = sort_pairs(experts_TK.to(device), num_experts=E, block_rows=block_rows)
    h_RF = gate_up(
        x_TD.to(device),
        place(gate_up_weights, device),
        slots_E.to(device),
        order,
        gate=gate,
        settings=settings,
    )
    rows = order.rows_TK.cpu().long()
    assert h_RF.dtype == dtype
    assert_near(h_RF.cpu()[rows], expected_TKF, dtype)
    y_RD = down(h_RF, place(down_weights, device), slots_E.to(device), order, settings=settings)
    assert_near(y_RD.cpu()[rows], expected_TKD, dtype)
    out_TD = combine(y_RD, order.rows_TK, weights_TK.to(device))
    expected_TD = combine_reference(y_RD.cpu(), order.rows_TK.cpu(), weights_TK)
    assert_near(out_TD.cpu(), expected_TD, dtype)


def layer(
    weight_format: Any = "plain",
    *,
    S: int = 3,
    D: int = 40,
    F: int = 24,
    dtype: torch.dtype = torch.float32,
    has_bias: bool = False,
) -> tuple[SlotWeights, torch.Tensor, SlotWeights, torch.Tensor]:
    first, first_SND = random_weights(weight_format, S, 2 * F, D, dtype=dtype, seed=1)
    second, second_SDF = random_weights(weight_format, S, D, F, dtype=dtype, seed=2)
    if has_bias:
        generator = torch.Generator().manual_seed(3)
        first = replace(first, bias=torch.randn(S, 2 * F, generator=generator).to(dtype))
        second = replace(second, bias=torch.randn(S, D, generator=generator).to(dtype))
    return first, first_SND, second, second_SDF


@pytest.mark.parametrize("block_rows", [1, 4, 16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_layer_equals_its_reference(
    dtype: torch.dtype, block_rows: int, device: torch.device
) -> None:
    """More experts than slots are asked for, in a table that is no identity."""
    check_layer(
        device, *layer(dtype=dtype), slots=[2, 0, 1, 1, 0], block_rows=block_rows, dtype=dtype
    )


@pytest.mark.parametrize("block_rows", [1, 16])
@pytest.mark.parametrize(("D", "F"), [(1, 1), (64, 32), (33, 31), (67, 5)], ids=str)
def test_odd_widths(D: int, F: int, block_rows: int, device: torch.device) -> None:
    check_layer(device, *layer(D=D, F=F), slots=[0, 1, 2], block_rows=block_rows)


@pytest.mark.parametrize("block_rows", [2, 16])
@pytest.mark.parametrize(
    "experts",
    [[], [[1]], [[1]] * 21, [[0], [2], [2], [2], [0]], [[3]], [[0, 1, 2, 3]] * 9],
    ids=["none", "one token", "one expert", "ragged", "last", "all"],
)
def test_ragged_empty_and_one_token_groups(
    experts: list[list[int]], block_rows: int, device: torch.device
) -> None:
    experts_TK = torch.tensor(experts, dtype=torch.int64).reshape(
        len(experts), -1 if experts else 1
    )
    check_layer(
        device,
        *layer(S=4),
        T=len(experts),
        slots=[1, 3, 0, 2],
        block_rows=block_rows,
        experts_TK=experts_TK,
    )


@pytest.mark.parametrize("block_rows", [1, 16])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "clamped"])
@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_gates_biases_and_the_order_of_gate_and_up(
    has_bias: bool, is_interleaved: bool, activation: Any, block_rows: int, device: torch.device
) -> None:
    gate = Gate(activation=activation, is_interleaved=is_interleaved, alpha=1.5, limit=0.8)
    check_layer(
        device, *layer(has_bias=has_bias), slots=[0, 2, 1], block_rows=block_rows, gate=gate
    )


@pytest.mark.parametrize("block_rows", [1, 16])
def test_transposed_weights(block_rows: int, device: torch.device) -> None:
    """As gpt-oss stores them: inputs in rows, gate and up interleaved in columns."""

    def place(weights: SlotWeights, device: torch.device) -> SlotWeights:
        stored_SKN = in_slab(weights.values.mT.contiguous(), device)
        assert weights.bias is not None
        return replace(weights, values=stored_SKN.mT, bias=in_slab(weights.bias, device))

    check_layer(
        device,
        *layer(has_bias=True),
        slots=[0, 2, 1],
        block_rows=block_rows,
        gate=Gate(activation="clamped", is_interleaved=True),
        place=place,
    )


@pytest.mark.parametrize("block_rows", [2, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weight_format", ["int8", "fp8", "int4", "mxfp4"])
def test_quantised_weights(
    weight_format: Any, dtype: torch.dtype, block_rows: int, device: torch.device
) -> None:
    """Two tiles of inputs and a part of one; two squares of fp8 in each direction."""
    check_layer(
        device,
        *layer(weight_format, S=2, D=160, F=96, has_bias=True),
        T=3,
        slots=[1, 0, 1],
        block_rows=block_rows,
        dtype=dtype,
        settings=TileSettings(
            block_outputs=32, block_inputs=64, num_warps=4, num_stages=2, group_blocks=2
        ),
    )


@pytest.mark.parametrize("block_rows", [2, 16])
@pytest.mark.parametrize("weight_format", ["plain", "int8", "fp8", "int4", "mxfp4"])
def test_gate_and_up_that_lie_apart(
    weight_format: Any, block_rows: int, device: torch.device
) -> None:
    """As checkpoints have them: each has scales of its own, also where 128 does not divide it."""
    D, F = 64, 160 if weight_format == "fp8" else 32
    check_layer(
        device,
        *weights_in_parts(weight_format, 2, F, D),
        *random_weights(weight_format, 2, D, F, seed=2),
        T=3,
        slots=[1, 0, 1],
        block_rows=block_rows,
        place=lambda weights, to: (apart if weights.values.dim() == 4 else moved)(weights, to),
    )


@pytest.mark.parametrize("weight_format", ["int4", "fp8"])
def test_tiles_wider_and_narrower_than_a_scale(weight_format: Any, device: torch.device) -> None:
    for block_inputs in (16, 256):
        check_layer(
            device,
            *layer(weight_format, S=2, D=256, F=32),
            T=2,
            slots=[1, 0],
            block_rows=16,
            settings=replace(TILES, block_inputs=block_inputs),
        )


@pytest.mark.parametrize("block_rows", [1, 16])
@pytest.mark.parametrize("missing", [-1, 3, 2**31 - 1])
def test_rows_of_an_expert_without_a_slot_are_nan(
    missing: int, block_rows: int, device: torch.device
) -> None:
    """Also where the table names a slot that does not exist: nothing outside the slab is read."""
    first, first_SND, second, second_SDF = layer()
    slots_E = torch.tensor([0, missing, 2], dtype=torch.int32, device=device)
    experts_TK = torch.tensor([[0, 1], [1, 2]])
    order = sort_pairs(experts_TK.to(device), num_experts=3, block_rows=block_rows)
    x_TD = torch.randn(2, 40)
    settings = ROWS if block_rows < 16 else TILES
    h_RF = gate_up(
        x_TD.to(device), moved(first, device), slots_E, order, gate=Gate(), settings=settings
    )
    h_TKF = h_RF.cpu()[order.rows_TK.cpu().long()]
    known_E = torch.tensor([0, -1, 2])
    expected_TKF, _ = experts_reference(
        x_TD, experts_TK, first_SND, second_SDF, known_E, activation="silu"
    )
    assert_near(h_TKF, expected_TKF, torch.float32)
    y_RD = down(torch.nan_to_num(h_RF), moved(second, device), slots_E, order, settings=settings)
    is_missing_TK = experts_TK == 1
    assert y_RD.cpu()[order.rows_TK.cpu().long()][is_missing_TK].isnan().all()


@pytest.mark.parametrize("block_rows", [1, 16])
def test_a_nan_in_one_row_stays_in_it(block_rows: int, device: torch.device) -> None:
    first, _, _, _ = layer()
    x_TD = torch.randn(3, 40)
    x_TD[1, 5] = float("nan")
    order = sort_pairs(
        torch.zeros(3, 1, dtype=torch.int64, device=device), num_experts=1, block_rows=block_rows
    )
    h_RF = gate_up(
        x_TD.to(device),
        moved(first, device),
        torch.zeros(1, dtype=torch.int32, device=device),
        order,
        gate=Gate(activation="clamped"),
        settings=ROWS if block_rows < 16 else TILES,
    )
    is_nan = h_RF.cpu()[order.rows_TK.cpu().flatten().long()].isnan()
    assert is_nan.all(dim=1).tolist() == [False, True, False]
    assert is_nan.any(dim=1).tolist() == [False, True, False]


def test_what_it_cannot_do_is_refused(device: torch.device) -> None:
    first, _, _, _ = layer()
    first = moved(first, device)
    order = sort_pairs(
        torch.zeros(2, 1, dtype=torch.int64, device=device), num_experts=1, block_rows=16
    )
    slots_E = torch.zeros(1, dtype=torch.int32, device=device)
    x_TD = torch.randn(2, 40, device=device)
    odd = replace(first, values=first.values[:, :-1])
    for x, weights, slots, complaint in [
        (x_TD[:1], first, slots_E, r"x_TD has shape \(1, 40\); expected: \(2, any\)"),
        (x_TD[:, 1:], first, slots_E, r"x has shape \(2, 39\); expected: \(any, 40\)"),
        (x_TD.half(), first, slots_E, r"values is torch\.float32; supported: torch\.float16"),
        (x_TD.double(), first, slots_E, "x is torch.float64; supported: torch.bfloat16"),
        (x_TD, first, slots_E.long(), "slots_E is torch.int64"),
        (x_TD, odd, slots_E, "47 weight rows together: not even"),
        (x_TD, replace(first, bias=x_TD), slots_E, "bias has shape"),
        (x_TD, replace(first, scales=x_TD), slots_E, "plain weights have none"),
        (x_TD, replace(first, values=first.values[:, :0]), slots_E, "no weights in it"),
    ]:
        with pytest.raises(UnsupportedKernelError, match=complaint):
            gate_up(x, weights, slots, order, gate=Gate(), settings=TILES)
    with pytest.raises(UnsupportedKernelError, match="h_RF has shape"):
        down(x_TD, first, slots_E, order, settings=TILES)
    with pytest.raises(UnsupportedKernelError, match="activation is 'tanh'; supported: silu"):
        Gate(activation="tanh")  # type: ignore[arg-type]
    for name, value in [
        ("block_outputs", 48),
        ("block_inputs", 8),
        ("num_warps", 3),
        ("num_stages", 0),
        ("group_blocks", 65),
    ]:
        with pytest.raises(ValueError, match=rf"{name} \({value}\) must be"):
            replace(TILES, **{name: value})


@pytest.mark.parametrize("activation", ["silu", "none"])
def test_the_operator_is_sound(activation: str, device: torch.device) -> None:
    order = sort_pairs(torch.tensor([[0], [1]], device=device), num_experts=2, block_rows=1)
    torch.library.opcheck(
        torch.ops.moe_runtime.grouped_gemm.default,
        (
            torch.randn(2, 8, device=device),
            torch.randn(2, 6, 8, device=device),
            None,
            None,
            torch.tensor([1, 0], dtype=torch.int32, device=device),
            order.pairs_R,
            order.block_experts_B,
            "plain",
            0,
            1 if activation == "silu" else 0,
            1,
            activation,
            False,
            0.0,
            0.0,
            [8, 64, 4, 2, 1],
        ),
    )
