"""Stored fp8 and mxfp4 weights become the same numbers on every instruction set, and in torch."""

import ctypes
import functools
import shutil
from pathlib import Path

import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moe_runtime.kernels.cpu import dequant as face
from moe_runtime.kernels.cpu.dequant import load_dequantizer
from moe_runtime.kernels.cpu.dequant_status import LEVELS, dequant_status, open_dequant_library
from moe_runtime.kernels.cpu.library import NOT_BUILT, OTHER_BUILD
from moe_runtime.kernels.reference import (
    dequantize_reference,
    quantize_fp8_reference,
    quantize_mxfp4_reference,
)
from moe_runtime.kernels.scaled_blocks import Dequantizer, ScaledFormat, ScaledWeights
from tests.kernels.test_cpu_gemv import compile_library

SOURCE = Path(face.__file__).with_name("dequant.c")
FP8_SHAPES = [(1, 1), (3, 31), (129, 127), (128, 128), (140, 150), (37, 256)]
MXFP4_SHAPES = [(1, 32), (7, 96), (32, 128), (45, 160), (70, 288)]
CASES: list[tuple[ScaledFormat, int, int]] = [
    *(("fp8", *shape) for shape in FP8_SHAPES),
    *(("mxfp4", *shape) for shape in MXFP4_SHAPES),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def available_levels() -> list[str]:
    library = open_dequant_library()
    built = () if isinstance(library, str) else LEVELS[: library.moe_dequant_levels() + 1]
    return ["torch", *built]


@pytest.fixture(params=["torch", *LEVELS])
def dequantizer(request: pytest.FixtureRequest) -> Dequantizer:
    if request.param not in available_levels():
        pytest.skip(f"{request.param} is not available here")
    return load_dequantizer(request.param)


def stored(form: ScaledFormat, N: int, K: int) -> ScaledWeights:
    """Random bytes, NaN of fp8 left out, and scales of ordinary size."""
    generator = torch.Generator().manual_seed(N * 1000 + K)
    if form == "mxfp4":
        codes = torch.randint(0, 256, (N, K // 2), generator=generator).to(torch.uint8)
        scales = torch.randint(110, 140, (N, K // 32), generator=generator).to(torch.uint8)
        return ScaledWeights(format=form, values=codes, scales=scales)
    numbers = torch.randint(0, 127, (N, K), generator=generator).to(torch.uint8)
    numbers += 128 * torch.randint(0, 2, (N, K), generator=generator).to(torch.uint8)
    scales = torch.rand(-(-N // 128), -(-K // 128), generator=generator) + 0.5
    return ScaledWeights(format=form, values=numbers.view(torch.float8_e4m3fn), scales=scales)


@functools.cache  # the loops are slow, and nobody changes what they give
def exact(form: ScaledFormat, N: int, K: int) -> torch.Tensor:
    """By the reference's loops: float64 holds a product of two such numbers exactly."""
    weights = stored(form, N, K)
    return dequantize_reference(weights.values.unsqueeze(0), weights.scales.unsqueeze(0), form)[0]


def expected(weights: ScaledWeights, dtype: torch.dtype) -> torch.Tensor:
    return exact(weights.format, *weights.shape).float().to(dtype)


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).clone().view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equal_to_the_loops(
    dequantizer: Dequantizer, case: tuple[ScaledFormat, int, int], dtype: torch.dtype
) -> None:
    """Law: each weight is number times scale in float32, rounded once; also transposed."""
    weights = stored(*case)
    N, K = weights.shape
    rows = torch.full((N, K), float("nan"), dtype=dtype)
    columns = torch.full((K, N), float("nan"), dtype=dtype)
    dequantizer.run(weights, rows)
    dequantizer.run(weights, columns.mT)
    assert torch.equal(as_bits(rows), as_bits(expected(weights, dtype)))
    assert torch.equal(as_bits(columns), as_bits(rows.mT))


def test_nothing_beside_the_result_is_touched(dequantizer: Dequantizer) -> None:
    """Law: a result that lies within other memory leaves that memory as it was."""
    for case in CASES:
        weights = stored(*case)
        N, K = weights.shape
        room = torch.full((N + 2, K + 5), 7.0, dtype=torch.bfloat16)
        dequantizer.run(weights, room[1 : N + 1, 3 : K + 3])
        assert torch.equal(room[1 : N + 1, 3 : K + 3], expected(weights, torch.bfloat16))
        room[1 : N + 1, 3 : K + 3] = 7.0
        assert bool((room == 7.0).all())
        room = torch.full((K + 2, N + 5), 7.0, dtype=torch.bfloat16)
        dequantizer.run(weights, room[1 : K + 1, 3 : N + 3].mT)
        assert torch.equal(room[1 : K + 1, 3 : N + 3].mT, expected(weights, torch.bfloat16))
        room[1 : K + 1, 3 : N + 3] = 7.0
        assert bool((room == 7.0).all())


def test_every_byte_of_fp8(dequantizer: Dequantizer) -> None:
    """Law: all 256 numbers, with scales whose products are subnormal or overflow, as torch has."""
    numbers = torch.arange(256, dtype=torch.uint8).repeat(1, 5).view(torch.float8_e4m3fn)
    scales = torch.tensor([2.0**-126, 1e-40, 3e36, 1 / 3, 1.7, 2.0**-9, 1e-30, 448.0, 1.0, 0.1])
    weights = ScaledWeights(format="fp8", values=numbers, scales=scales.view(1, -1))
    found = torch.empty(1, 1280, dtype=torch.bfloat16)
    dequantizer.run(weights, found)
    spread = scales.repeat_interleave(128).view(1, -1)
    product = (numbers.float() * spread).bfloat16()
    is_nan = product.isnan()
    assert torch.equal(found.isnan(), is_nan)
    assert torch.equal(as_bits(found[~is_nan]), as_bits(product[~is_nan]))


def test_every_scale_of_mxfp4(dequantizer: Dequantizer) -> None:
    """Law: all 16 numbers under all 256 scales are those of transformers' own routine."""
    codes = torch.arange(256, dtype=torch.uint8)[:16].mul(16) + torch.arange(16, dtype=torch.uint8)
    blocks = codes.repeat(256, 1)  # [N, 16], one group a row
    scales = torch.arange(256, dtype=torch.uint8).view(256, 1)
    found = torch.empty(256, 32, dtype=torch.bfloat16)
    dequantizer.run(ScaledWeights(format="mxfp4", values=blocks, scales=scales), found)
    theirs = convert_moe_packed_tensors(blocks.view(1, 256, 1, 16), scales.view(1, 256, 1))[0].mT
    assert torch.equal(as_bits(found[:255]), as_bits(theirs[:255]))
    assert bool(found[255].isnan().all())  # NaN by the standard; transformers has infinities


def test_results_larger_than_the_caches() -> None:
    """Law: what is written past the caches is what torch writes, at addresses of every kind."""
    if len(available_levels()) == 1:
        pytest.skip("no compiled library")
    weights = stored("mxfp4", 2050, 2080)
    rows = torch.empty(2050, 2080, dtype=torch.bfloat16)
    load_dequantizer("torch").run(weights, rows)
    for first in (0, 1, 8):
        room = torch.empty(2080, 2064, dtype=torch.bfloat16)
        load_dequantizer().run(weights, room[:, first : first + 2050].mT)
        assert torch.equal(room[:, first : first + 2050].mT, rows)


@pytest.mark.parametrize("case", CASES[-1:] + CASES[4:5], ids=str)
def test_threads_change_nothing(
    dequantizer: Dequantizer, case: tuple[ScaledFormat, int, int]
) -> None:
    weights = stored(*case)
    N, K = weights.shape
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        rows = torch.empty(N, K, dtype=torch.bfloat16)
        columns = torch.empty(K, N, dtype=torch.bfloat16)
        dequantizer.run(weights, rows)
        dequantizer.run(weights, columns.mT)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(rows, expected(weights, torch.bfloat16))
    assert torch.equal(columns, rows.mT)


def test_scales_that_are_no_numbers_show() -> None:
    """Law: `is_sound` is false for one NaN or infinite scale, and true for any numbers."""
    for bad in (float("nan"), float("inf")):
        weights = stored("fp8", 140, 300)
        assert weights.is_sound
        weights.scales[1, 2] = bad
        assert not weights.is_sound
    weights = stored("mxfp4", 45, 160)
    weights.scales[44, 4] = 254
    assert weights.is_sound
    weights.scales[44, 4] = 255
    assert not weights.is_sound


def test_shapes_that_do_not_belong_together_are_refused(dequantizer: Dequantizer) -> None:
    """Law: a wrong shape raises ValueError before any memory is touched."""
    weights = stored("fp8", 140, 300)
    dense = torch.empty(140, 300, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"result of shape \(300, 140\)"):
        dequantizer.run(weights, dense.mT)
    narrow = ScaledWeights(format="fp8", values=weights.values, scales=weights.scales[:1])
    with pytest.raises(ValueError, match=r"scales of shape \(1, 3\).*need \(2, 3\)"):
        dequantizer.run(narrow, dense)
    cut = ScaledWeights(
        format="mxfp4", values=torch.zeros(2, 8).to(torch.uint8), scales=torch.zeros(2, 1)
    )
    with pytest.raises(ValueError, match="columns that 32 divides"):
        dequantizer.run(cut, torch.empty(2, 16, dtype=torch.bfloat16))


def test_quantising_loses_what_the_format_allows() -> None:
    """Law: the reference quantisers' results are within half a step of what went in."""
    w = torch.randn(150, 192, generator=torch.Generator().manual_seed(0))
    values, scales = quantize_fp8_reference(w)
    back = dequantize_reference(values.unsqueeze(0), scales.unsqueeze(0), "fp8")[0]
    assert float(((back - w).abs() / w.abs().clamp(min=0.05)).max()) < 2**-4
    blocks, powers = quantize_mxfp4_reference(w)
    codes = blocks.flatten(1).unsqueeze(0)
    back = dequantize_reference(codes, powers.unsqueeze(0), "mxfp4")[0]
    steps = (powers.float() - 127).exp2().repeat_interleave(32, 1)
    assert bool(((back - w).abs() <= steps * 2.0).all())  # 6 stands for all below 8
    assert float((back - w).abs().mean()) < 0.1


def test_status_names_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: without a library, or with another one, torch computes and the status says why."""
    assert open_dequant_library(tmp_path) == NOT_BUILT
    (tmp_path / "dequant_library.so").write_bytes(b"not a library")
    assert open_dequant_library(tmp_path) == OTHER_BUILD
    monkeypatch.setattr(face, "open_dequant_library", lambda: NOT_BUILT)
    assert type(load_dequantizer()).__name__ == "TorchDequantizer"
    with pytest.raises(ValueError, match="choose from torch"):
        load_dequantizer("avx2")
    assert dequant_status()


def test_plain_c_is_what_other_processors_get(tmp_path: Path) -> None:
    """Law: without x86 instructions the library builds, without a warning, and has one level."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    compile_library(
        compiler, SOURCE, tmp_path / "library.so", "-DMOE_OTHER_PROCESSOR", "-Wall", "-Werror"
    )
    library = ctypes.CDLL(str(tmp_path / "library.so"))
    assert library.moe_dequant_levels() == 0
    weights = stored("mxfp4", 45, 160)
    found = torch.empty(160, 45, dtype=torch.bfloat16)
    face.CpuDequantizer(library, 0).run(weights, found.mT)
    assert torch.equal(found.mT, expected(weights, torch.bfloat16))
