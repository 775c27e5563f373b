"""The C experts out of fp8 and mxfp4 rows: honest sums, equal bits of mxfp4, no byte of others."""

import copy
import ctypes
import mmap
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.nn import functional

from moe_runtime.kernels.cpu.experts import CpuExperts
from moe_runtime.kernels.cpu.experts_status import LEVELS
from moe_runtime.kernels.cpu.matrix import FORMS, Form, Matrix, Part
from moe_runtime.kernels.cpu.operation import ClampedGate, Gate
from moe_runtime.kernels.scaled_blocks import ScaledFormat, ScaledWeights, TorchDequantizer
from tests.kernels.test_cpu_experts import Layer, assert_close, gated, kernel_of
from tests.kernels.test_cpu_matrix import at_the_end_of_a_page, bits, quantised

BF16 = torch.bfloat16
BOTH: list[ScaledFormat] = ["fp8", "mxfp4"]
# Whole steps and groups, halves of them, and squares that are cut or begin a second row of squares.
SIZES: dict[ScaledFormat, list[tuple[int, int]]] = {
    "fp8": [(64, 48), (128, 256), (300, 129), (515, 100), (31, 127), (1200, 96)],
    "mxfp4": [(64, 32), (96, 160), (32, 64), (2080, 32), (544, 96)],
}


@pytest.fixture(params=LEVELS)
def kernel(request: pytest.FixtureRequest) -> CpuExperts:
    return kernel_of(request.param, BF16)


def matrix_of(weights: ScaledWeights) -> Matrix:
    num_rows, num_columns = weights.shape
    form = FORMS[weights.format]
    part = Part(form=form, num_rows=num_rows, rows=weights.values, scales=weights.scales)
    return Matrix([part], num_columns)


def scaled(form: ScaledFormat, w_NK: torch.Tensor) -> ScaledWeights:
    (part,) = quantised(FORMS[form])(w_NK)._held
    assert part.scales is not None
    return ScaledWeights(format=form, values=part.rows, scales=part.scales)


def dense_of(weights: ScaledWeights, dtype: torch.dtype) -> torch.Tensor:
    found = torch.empty(weights.shape, dtype=dtype)
    TorchDequantizer().run(weights, found)
    return found


def of(layer: Layer, form: ScaledFormat, make: Callable[[ScaledWeights], object]) -> Layer:
    """The same layer out of what `make` makes of its quantised weights."""
    other = copy.copy(layer)
    other.up = [make(scaled(form, w)) for w in layer.up]  # type: ignore[misc]
    other.down = [make(scaled(form, w)) for w in layer.down]  # type: ignore[misc]
    return other


@pytest.mark.parametrize("form", BOTH)
@pytest.mark.parametrize("counts", [[1], [2, 0, 1], [5], [3, 17, 4]])
def test_scaled_rows_equal_the_honest_loop(
    kernel: CpuExperts, form: ScaledFormat, counts: list[int]
) -> None:
    """Law: the sum is that of the numbers times their scales, in any size."""
    for dim, ffn in SIZES[form]:
        layer = Layer(BF16, counts, dim=dim, ffn=ffn)
        expected = of(layer, form, partial(dense_of, dtype=torch.float64))
        found = of(layer, form, matrix_of).run(kernel)
        assert_close(found, expected.expected(gated(functional.silu)))


@pytest.mark.parametrize("counts", [[1], [2, 0, 1], [5], [3, 17, 4]])
def test_mxfp4_rows_give_the_bits_of_dequantised_ones(
    kernel: CpuExperts, counts: list[int]
) -> None:
    """Law: whatever the level, what is computed in place is what dequantising would give."""
    for dim, ffn in SIZES["mxfp4"]:
        layer = Layer(BF16, counts, dim=dim, ffn=ffn)
        found = of(layer, "mxfp4", matrix_of).run(kernel)
        assert torch.equal(found, of(layer, "mxfp4", partial(dense_of, dtype=BF16)).run(kernel))


def numbers_of(kernel: CpuExperts, weights: ScaledWeights) -> torch.Tensor:
    """Each weight as the kernel has it: what its row gives for a token that is one at its place."""
    num_rows, num_columns = weights.shape
    step = kernel.layer(dim=num_columns, ffn=num_rows, num_up=num_rows, gate=Gate.NONE).begin(
        torch.eye(num_columns, dtype=BF16), torch.arange(num_columns), torch.ones(num_columns)
    )
    none = torch.zeros(num_columns, num_rows, dtype=BF16)
    down = Matrix([Part(form=Form.PLAIN, num_rows=num_columns, rows=none)], num_rows)
    step.run([matrix_of(weights)], [down], [(0, num_columns)], is_last=True)
    return step._part(3).view(BF16)[: num_rows * num_columns].view(num_columns, num_rows).T


def test_every_number_of_fp8(kernel: CpuExperts) -> None:
    """Law: all 254 numbers, subnormal ones too, come times their scale, and no NaN is lost."""
    values = torch.arange(256).to(torch.uint8).view(4, 64).view(torch.float8_e4m3fn)
    for scale in (1.0, 2.0**-20, 0.75):
        weights = ScaledWeights(format="fp8", values=values, scales=torch.full((1, 1), scale))
        found, expected = numbers_of(kernel, weights), dense_of(weights, BF16)
        is_nan = expected.isnan()
        assert is_nan.sum() == 2
        assert found[is_nan.any(1)].isnan().any(1).all()
        sound = values.clone()
        sound.view(torch.uint8)[is_nan] = 0
        weights = ScaledWeights(format="fp8", values=sound, scales=torch.full((1, 1), scale))
        assert torch.equal(numbers_of(kernel, weights), dense_of(weights, BF16))


def test_every_number_of_mxfp4(kernel: CpuExperts) -> None:
    """Law: all codes come times all scales that keep them normal; a scale's NaN arrives."""
    codes = (torch.arange(16)[None] * 17).to(torch.uint8).repeat(251, 1)
    scales = torch.arange(2, 253).to(torch.uint8)[:, None]
    weights = ScaledWeights(format="mxfp4", values=codes, scales=scales)
    assert torch.equal(numbers_of(kernel, weights), dense_of(weights, BF16))
    weights.scales[7] = 255
    assert numbers_of(kernel, weights)[7].isnan().all()


@pytest.mark.parametrize("form", BOTH)
def test_reads_nothing_behind_the_rows(kernel: CpuExperts, form: ScaledFormat) -> None:
    """Law: values and scales that end before a forbidden page are read."""
    layer = Layer(BF16, [1, 5], dim=37 if form == "fp8" else 96, ffn=32)
    held: list[tuple[mmap.mmap, int]] = []

    def at_end(weights: ScaledWeights) -> Matrix:
        values = at_the_end_of_a_page(weights.values.view(torch.uint8), held)
        values = values.view(weights.values.dtype)
        scales = at_the_end_of_a_page(weights.scales, held)
        return matrix_of(ScaledWeights(format=form, values=values, scales=scales))

    try:
        found = of(layer, form, at_end).run(kernel)
        assert torch.equal(bits(found), bits(of(layer, form, matrix_of).run(kernel)))
    finally:
        for _, address in held:
            ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), mmap.PAGESIZE, 3)


def test_parts_that_do_not_fit_are_refused() -> None:
    """Law: what the library would read beyond its end never reaches it."""
    fp8, mxfp4 = (scaled(form, torch.randn(130, 160)) for form in BOTH)

    def part(weights: ScaledWeights, scales: torch.Tensor) -> Part:
        form = FORMS[weights.format]
        return Part(form=form, num_rows=130, rows=weights.values, scales=scales)

    bad = {
        r"scales must be .*float32 .*\[2, 2\], got \[1, 2\]": (part(fp8, fp8.scales[:1]), 160),
        r"got \[2, 2\] torch.bfloat16": (part(fp8, fp8.scales.bfloat16()), 160),
        r"rows must be .*float8_e4m3fn .*\[130, 161\]": (part(fp8, fp8.scales), 161),
        r"scales must be .*uint8 .*\[130, 5\], got \[130, 4\]": (
            part(mxfp4, mxfp4.scales[:, :4]),
            160,
        ),
        "groups of 32 weights, got 144": (part(mxfp4, mxfp4.scales), 144),
    }
    for said, (one, num_columns) in bad.items():
        with pytest.raises(ValueError, match=said):
            Matrix([one], num_columns)


def clamped(v: torch.Tensor, gate: ClampedGate) -> torch.Tensor:
    """As transformers writes it for gpt-oss."""
    g, u = v[..., ::2].clamp(max=gate.limit), v[..., 1::2].clamp(-gate.limit, gate.limit)
    return (u + 1) * (g * torch.sigmoid(g * gate.alpha))


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
@pytest.mark.parametrize("level", LEVELS)
def test_biases_and_the_clamped_gate(level: str, dtype: torch.dtype) -> None:
    """Law: both biases are added before anything is rounded, and gates are cut off at the limit."""
    kernel = kernel_of(level, dtype)
    layer = Layer(dtype, [2, 0, 3], dim=96, ffn=64)
    generator = torch.Generator().manual_seed(1)
    biases = [
        tuple(torch.randn(n, generator=generator).to(dtype) for n in (128, 96)) for _ in layer.rows
    ]
    gate = ClampedGate(alpha=1.702, limit=0.75)
    step = layer.begin(kernel, gate, is_interleaved=True)
    step._scratch.fill_(float("nan"))
    found = step.run(layer.up, layer.down, layer.rows, biases=biases, is_last=True)
    expected = torch.zeros(layer.x.shape, dtype=torch.float64)
    for w_up, w_down, (of_up, of_down), (begin, end) in zip(
        layer.up, layer.down, biases, layer.rows, strict=True
    ):
        for r in range(begin, end):
            v = w_up.double() @ layer.x[layer.token[r]].double() + of_up.double()
            y = w_down.double() @ clamped(v, gate) + of_down.double()
            expected[layer.token[r]] += layer.weight[r].double() * y
    assert found is not None
    assert_close(found, expected)


def test_biases_of_other_shapes_are_refused() -> None:
    kernel = kernel_of(CpuExperts.status(), BF16)
    layer = Layer(BF16, [1])
    step = layer.begin(kernel, Gate.SILU)
    biases = [(torch.zeros(96, dtype=BF16), torch.zeros(63, dtype=BF16))]
    with pytest.raises(ValueError, match=r"down_bias must be .*\[64\], got \[63\]"):
        step.run(layer.up, layer.down, layer.rows, biases=biases, is_last=True)
