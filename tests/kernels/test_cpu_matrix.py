"""The C experts out of packed and quantised rows: equal bits, honest sums, no byte of others."""

import copy
import ctypes
import mmap
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from moe_runtime.kernels.cpu.experts import CpuExperts
from moe_runtime.kernels.cpu.experts_status import LEVELS
from moe_runtime.kernels.cpu.matrix import Form, Matrix, Part, Weight
from moe_runtime.kernels.cpu.operation import Gate, TorchGate
from moe_runtime.kernels.cpu.unpack import load_codec
from moe_runtime.kernels.packed_blocks import PADDING_BYTES
from moe_runtime.kernels.quantise import dequantise, quantise
from moe_runtime.kernels.reference import (
    dequantize_reference,
    quantize_fp8_reference,
    quantize_mxfp4_reference,
)
from tests.kernels.test_cpu_experts import Layer, assert_close, gated, kernel_of

BF16 = torch.bfloat16
QUANTISED = {Form.INT8: "int8", Form.INT4: "int4"}
WITH_SCALES = [*QUANTISED, Form.FP8, Form.MXFP4]
Make = Callable[[torch.Tensor], Matrix]


@pytest.fixture(params=LEVELS)
def kernel(request: pytest.FixtureRequest) -> CpuExperts:
    return kernel_of(request.param, BF16)


def packed_part(w_NK: torch.Tensor) -> Part:
    """A sealed block of all rows."""
    codec = load_codec()
    block = codec.pack(w_NK)
    padded = torch.zeros(-(-block.numel() // PADDING_BYTES) * PADDING_BYTES, dtype=torch.uint8)
    padded[: block.numel()] = block
    codec.seal(padded, 7)
    return Part(form=Form.PACKED, num_rows=len(w_NK), rows=padded)


def plain_part(w_NK: torch.Tensor) -> Part:
    return Part(form=Form.PLAIN, num_rows=len(w_NK), rows=w_NK)


def packed(w_NK: torch.Tensor) -> Matrix:
    return Matrix([packed_part(w_NK)], w_NK.shape[1])


def in_many_parts(w_NK: torch.Tensor) -> Matrix:
    """Blocks of uneven sizes with rows as they were between them, as a packed file may have."""
    parts, begin = [], 0
    for n, end in enumerate([1, 2, 7, 40, len(w_NK)]):
        if begin < end <= len(w_NK):
            parts.append((plain_part if n % 2 else packed_part)(w_NK[begin:end]))
            begin = end
    if begin < len(w_NK):
        parts.append(packed_part(w_NK[begin:]))
    return Matrix(parts, w_NK.shape[1])


def quantised(form: Form) -> Make:
    def make(w_NK: torch.Tensor) -> Matrix:
        if form is Form.FP8:
            values, scales = quantize_fp8_reference(w_NK)
        elif form is Form.MXFP4:
            values, scales = quantize_mxfp4_reference(w_NK)
            values = values.flatten(1)
        else:
            values, scales = quantise(w_NK, QUANTISED[form])  # type: ignore[arg-type]
        part = Part(form=form, num_rows=len(w_NK), rows=values, scales=scales)
        return Matrix([part], w_NK.shape[1])

    return make


def of(layer: Layer, make: Make) -> Layer:
    """The same layer out of what `make` makes of its weights."""
    other = copy.copy(layer)
    other.up, other.down = [make(w) for w in layer.up], [make(w) for w in layer.down]  # type: ignore[misc]
    return other


def bits(out: torch.Tensor) -> torch.Tensor:
    return out.view(torch.int16)


@pytest.mark.parametrize("make", [packed, in_many_parts])
@pytest.mark.parametrize("counts", [[1], [2, 0, 1], [5], [3, 17, 4]])
def test_packed_rows_give_the_bits_of_plain_ones(
    kernel: CpuExperts, make: Make, counts: list[int]
) -> None:
    """Law: for one to many tokens, with tiles and tails, in one block or several."""
    for dim, ffn in [(64, 48), (128, 256), (300, 129), (515, 100), (31, 127)]:
        layer = Layer(BF16, counts, dim=dim, ffn=ffn)
        assert torch.equal(of(layer, make).run(kernel), layer.run(kernel)), (dim, ffn)


def patterns(generator: torch.Generator) -> torch.Tensor:
    """All 65,536 numbers of 16 bits, shuffled: most high bytes are escapes."""
    words = torch.randperm(2**16, generator=generator).to(torch.int32)
    return (words - 2**15).to(torch.int16).view(256, 256)


def test_all_bit_patterns(kernel: CpuExperts) -> None:
    """Law: every bf16 there is, infinities and NaN included, multiplies as it does unpacked."""
    w = patterns(torch.Generator().manual_seed(0))
    finite = torch.where((w & 0x7F80) == 0x7F80, w & 0x7F7F, w)
    for words in (w, finite, finite & 0x7FF):  # the last: denormals and the smallest
        layer = Layer(BF16, [1, 3], dim=256, ffn=256, has_gate=False)
        layer.up = [words.view(BF16), words.roll(1, 0).contiguous().view(BF16)]
        layer.down = layer.up[::-1]
        for gate in (Gate.RELU, Gate.SILU):
            found, expected = of(layer, packed).run(kernel, gate), layer.run(kernel, gate)
            assert torch.equal(bits(found), bits(expected))


@pytest.mark.parametrize(
    "row", ["all escapes", "no escapes", "last weights", "first weights", "one row of many"]
)
def test_escapes_anywhere(kernel: CpuExperts, row: str) -> None:
    """Law: adversarial places of escapes, and more in one block than weights of a tile."""
    generator = torch.Generator().manual_seed(1)
    w = (torch.randn(96, 1040, generator=generator) * 0.02).bfloat16()
    high = torch.arange(96 * 1040).view(96, 1040) % 200 / 16
    rare = (2.0 ** (high - 6)).bfloat16()
    where = torch.zeros(96, 1040, dtype=torch.bool)
    where[:, -20:] = row == "last weights"
    where[:, :20] = row == "first weights"
    where[17] = row == "one row of many"
    w = torch.where(where | (row == "all escapes"), rare, w)
    if row == "no escapes":
        w = torch.full_like(w, 0.5)
    layer = Layer(BF16, [1, 6], dim=1040, ffn=48)
    layer.up = [w, w.flip(0)]
    for make in (packed, in_many_parts):
        assert torch.equal(of(layer, make).run(kernel), layer.run(kernel))


@given(
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=5).filter(any),
    seed=st.integers(0, 2**16),
    form=st.sampled_from([Form.PACKED, *WITH_SCALES]),
    level=st.sampled_from(list(LEVELS)),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_bits_do_not_depend_on_what_shares_a_call(
    counts: list[int], seed: int, form: Form, level: str, data: st.DataObject
) -> None:
    """Law: however experts arrive, in whatever calls, the output has the same bits."""
    kernel = CpuExperts.load(BF16, level=level) or CpuExperts.load(BF16)
    if kernel is None:
        pytest.skip(CpuExperts.status())
    layer = Layer(BF16, counts, seed=seed, dim=160, ffn=64)
    other = of(layer, packed if form is Form.PACKED else quantised(form))
    order = data.draw(st.permutations(range(len(counts))))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(counts)), max_size=3)) | {len(counts)})
    groups = [list(order[a:b]) for a, b in zip([0, *cuts[:-1]], cuts, strict=True)]
    found = other.run(kernel, groups=groups)
    assert torch.equal(found, other.run(kernel))
    if form is Form.PACKED:
        assert torch.equal(found, layer.run(kernel))


@pytest.mark.parametrize("form", [Form.PACKED, *WITH_SCALES])
def test_bits_do_not_depend_on_threads(form: Form) -> None:
    """Law: large enough for threads to share, the output is that of one thread.

    Of fp8, in pieces of fewer rows than a square has.
    """
    kernel = kernel_of(CpuExperts.status(), BF16)
    layer = Layer(BF16, [1, 2, 5, 1], dim=2048, ffn=160)
    other = of(layer, in_many_parts if form is Form.PACKED else quantised(form))
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(other.run(kernel))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("form", WITH_SCALES)
def test_a_quantised_row_has_the_same_bits_among_others(kernel: CpuExperts, form: Form) -> None:
    layer = of(Layer(BF16, [16], num_tokens=16, dim=320, ffn=96), quantised(form))
    layer.token = torch.arange(16)
    together = layer.run(kernel)
    x, weight = layer.x, layer.weight
    for count in (1, 2, 3, 4, 5, 7, 12):
        layer.x, layer.weight = x[:count], weight[:count]
        layer.token, layer.rows = torch.arange(count), [(0, count)]
        assert torch.equal(layer.run(kernel), together[:count])


@pytest.mark.parametrize("form", QUANTISED)
@pytest.mark.parametrize("counts", [[1], [2, 0, 1], [3, 17, 4]])
def test_quantised_rows_equal_the_honest_loop(
    kernel: CpuExperts, form: Form, counts: list[int]
) -> None:
    """Law: the sum is that of the weights which values and scales stand for, in any size."""
    odd = [(31, 33), (515, 101)] if form is Form.INT8 else [(30, 34), (514, 102)]
    for dim, ffn in [(64, 32), (160, 96), (2048, 64), *odd]:
        layer = Layer(BF16, counts, dim=dim, ffn=ffn)
        other = of(layer, quantised(form))
        expected = copy.copy(layer)
        expected.up = [honest(form, w) for w in layer.up]
        expected.down = [honest(form, w) for w in layer.down]
        assert_close(other.run(kernel), expected.expected(gated(functional.silu)))


def honest(form: Form, w: torch.Tensor) -> torch.Tensor:
    """What the weights stand for; a test below compares `dequantise` with the plain loop."""
    found = torch.empty(w.shape, dtype=torch.float64)
    values, scales = quantise(w, QUANTISED[form])  # type: ignore[arg-type]
    dequantise(values, scales, QUANTISED[form], found)  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("form", QUANTISED)
def test_a_gate_in_torch(kernel: CpuExperts, form: Form) -> None:
    layer = of(Layer(BF16, [2, 0, 3]), packed)

    def clamped(v: torch.Tensor) -> torch.Tensor:
        first, second = v.chunk(2, dim=-1)
        return functional.silu(first.clamp(max=0.5)) * second.clamp(-0.5, 0.5)

    gate: TorchGate = clamped
    assert torch.equal(layer.run(kernel, gate), Layer(BF16, [2, 0, 3]).run(kernel, gate))


def at_the_end_of_a_page(tensor: torch.Tensor, held: list[tuple[mmap.mmap, int]]) -> torch.Tensor:
    """A copy behind whose last byte nothing may be read."""
    size = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    area = mmap.mmap(-1, size + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + size), mmap.PAGESIZE, 0) == 0
    held.append((area, address + size))
    found = torch.frombuffer(
        area, dtype=tensor.dtype, count=tensor.numel(), offset=size - tensor.nbytes
    ).view(tensor.shape)
    return found.copy_(tensor)


@pytest.mark.parametrize("form", [Form.PACKED, *QUANTISED])
def test_reads_nothing_behind_the_rows(kernel: CpuExperts, form: Form) -> None:
    """Law: blocks, values and scales that end before a forbidden page are read."""
    layer = Layer(BF16, [1, 5], dim=38 if form is Form.INT4 else 37, ffn=32)
    make = packed if form is Form.PACKED else quantised(form)
    expected = of(layer, make).run(kernel)
    held: list[tuple[mmap.mmap, int]] = []

    def at_end(w: torch.Tensor) -> Matrix:
        (part,) = make(w)._held
        scales = part.scales if part.scales is None else at_the_end_of_a_page(part.scales, held)
        rows = part.rows
        if form is Form.PACKED:  # without the zeros behind the last escape
            rows = load_codec().pack(w)
        rows = at_the_end_of_a_page(rows, held)
        moved = Part(form=form, num_rows=part.num_rows, rows=rows, scales=scales)
        return Matrix([moved], w.shape[1])

    try:
        assert torch.equal(of(layer, at_end).run(kernel), expected)
    finally:
        for _, address in held:
            ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), mmap.PAGESIZE, 3)


@pytest.mark.parametrize("dtype", QUANTISED.values())
def test_quantising_is_within_half_a_step(dtype: str) -> None:
    """Law: each weight is within half a scale; zeros are exact; what is not finite shows."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(33, 128, generator=generator).bfloat16()
    w[3] = 0
    w[4, 40] = 1e30  # its neighbours become zero
    values, scales = quantise(w, dtype)  # type: ignore[arg-type]
    found = torch.empty(33, 128)
    dequantise(values, scales, dtype, found)  # type: ignore[arg-type]
    step = scales.float().view(33, -1, 1).expand(33, -1, 128 // scales.view(33, -1).shape[1])
    error = (found - w.float()).abs()
    # int4 scales are rounded to 8 bits, and the greatest of seven steps with them.
    assert (error <= step.reshape(33, 128) * (0.5 + 7 * 2**-9) + 1e-30).all()
    assert (found[3] == 0).all()
    torch.testing.assert_close(found, honest_of(values, scales, dtype))
    w[5, 0] = float("inf")
    values, scales = quantise(w, dtype)  # type: ignore[arg-type]
    dequantise(values, scales, dtype, found)  # type: ignore[arg-type]
    assert found[5, 0].isnan()
    assert found[6].isfinite().all()


def honest_of(values: torch.Tensor, scales: torch.Tensor, dtype: str) -> torch.Tensor:
    return dequantize_reference(values[None], scales[None], dtype, 32)[0].float()


def test_parts_that_do_not_fit_are_refused() -> None:
    w = torch.randn(8, 64).bfloat16()
    block = packed_part(w).rows
    values, scales = quantise(w, "int8")
    bad = {
        "is no packed block of 8 x 63": ([Part(form=Form.PACKED, num_rows=8, rows=block)], 63),
        "is no packed block of 9 x 64": ([Part(form=Form.PACKED, num_rows=9, rows=block)], 64),
        "128 bytes is no packed": ([Part(form=Form.PACKED, num_rows=8, rows=block[:128])], 64),
        "no scales": ([Part(form=Form.INT8, num_rows=8, rows=values)], 64),
        "scales must be": (
            [Part(form=Form.INT8, num_rows=8, rows=values, scales=scales.bfloat16())],
            64,
        ),
        "rows must be": ([Part(form=Form.PLAIN, num_rows=8, rows=w.float())], 64),
        "an even number": ([Part(form=Form.INT4, num_rows=8, rows=values)], 41),
    }
    for said, (parts, num_columns) in bad.items():
        with pytest.raises(ValueError, match=said):
            Matrix(parts, num_columns)


def test_matrices_of_other_shapes_are_refused() -> None:
    kernel = kernel_of(CpuExperts.status(), BF16)
    layer = Layer(BF16, [1])
    up: list[Weight] = [packed(layer.up[0][:-1])]
    step = layer.begin(kernel, Gate.SILU)
    with pytest.raises(
        ValueError, match=r"up must be a bfloat16 matrix \[96, 64\], got \[95, 64\]"
    ):
        step.run(up, [packed(layer.down[0])], layer.rows, is_last=True)
