"""Packed blocks give back every bit, on every instruction set, and say when they were altered."""

import ctypes
import mmap
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.kernels.cpu import unpack as face
from moe_runtime.kernels.cpu.library import NOT_BUILT, OTHER_BUILD
from moe_runtime.kernels.cpu.unpack import load_codec
from moe_runtime.kernels.cpu.unpack_status import LEVELS, open_unpack_library
from moe_runtime.kernels.packed_blocks import (
    ALTERED,
    FOREIGN,
    HEADER_BYTES,
    INTACT,
    PADDING_BYTES,
    BlockCodec,
    BlockTask,
    index_entries,
    row_bytes,
)
from moe_runtime.kernels.reference import unpack_reference
from tests.kernels.test_cpu_gemv import compile_library

SOURCE = Path(face.__file__).with_name("unpack.c")
IDENTITY = 0xFEDCBA9876543210
# Rows shorter than a tile, of whole tiles, with tails of every kind, in several index groups.
SHAPES = [
    (1, 1), (3, 5), (70, 64), (5, 127), (4, 128), (7, 129), (3, 192), (40, 200), (9, 255),
    (66, 384), (2, 4096), (3, 4099), (1, 9000),
]  # fmt: skip


def available_levels() -> list[str]:
    library = open_unpack_library()
    built = () if isinstance(library, str) else LEVELS[: library.moe_unpack_levels() + 1]
    return ["torch", *built]


@pytest.fixture(params=["torch", *LEVELS])
def codec(request: pytest.FixtureRequest) -> BlockCodec:
    if request.param not in available_levels():
        pytest.skip(f"{request.param} is not available here")
    return load_codec(request.param)


def normal(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(*shape, generator=generator) * 0.02).bfloat16()


def any_bits(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(-(2**15), 2**15, shape, generator=generator, dtype=torch.int16)
    return words.view(torch.bfloat16)


def sealed(codec: BlockCodec, weights_NK: torch.Tensor) -> torch.Tensor:
    block = codec.pack(weights_NK)
    padded = torch.zeros(-(-block.numel() // PADDING_BYTES) * PADDING_BYTES, dtype=torch.uint8)
    padded[: block.numel()] = block
    codec.seal(padded, IDENTITY)
    return padded


def task(block: torch.Tensor, N: int, K: int, weights: torch.Tensor | None) -> BlockTask:
    return BlockTask(block=block, N=N, K=K, identity=IDENTITY, weights=weights)


def unpacked(codec: BlockCodec, block: torch.Tensor, N: int, K: int) -> torch.Tensor:
    weights = torch.full((N, K), torch.nan, dtype=torch.bfloat16)
    assert codec.run([task(block, N, K, weights)]) == [INTACT]
    return weights


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


def test_all_patterns_come_back(codec: BlockCodec) -> None:
    """Law: every one of the 65,536 bf16 patterns, NaNs with their payload included."""
    words = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for weights_NK in (words.view(64, 1024), words.view(1024, 64), words.flip(0).view(1, -1)):
        weights = weights_NK.contiguous().view(torch.bfloat16)
        N, K = weights.shape
        assert same_bits(unpacked(codec, sealed(codec, weights), N, K), weights)


@pytest.mark.parametrize(("N", "K"), SHAPES)
@pytest.mark.parametrize("make", [normal, any_bits, torch.zeros], ids=lambda make: make.__name__)
def test_levels_agree_with_the_reference_in_every_byte(
    N: int, K: int, make: Callable[..., torch.Tensor], codec: BlockCodec
) -> None:
    weights = make(N, K).bfloat16()
    block = sealed(codec, weights)
    assert torch.equal(block, sealed(load_codec("torch"), weights))
    assert same_bits(unpack_reference(block, N, K), weights)
    for stream in (False, True):
        found = torch.full((N, K), torch.nan, dtype=torch.bfloat16)
        assert codec.run([task(block, N, K, found)], stream=stream) == [INTACT]
        assert same_bits(found, weights)


@pytest.mark.parametrize("offset", [0, 2, 62])
def test_any_address_will_do(offset: int, codec: BlockCodec) -> None:
    """Law: blocks at odd addresses, weights at any phase in a cache line."""
    weights = normal(20, 300)
    block = sealed(codec, weights)
    room = torch.zeros(block.numel() + 64, dtype=torch.uint8)
    room[offset + 1 : offset + 1 + block.numel()] = block
    target = torch.zeros(weights.numel() + 64, dtype=torch.bfloat16)
    found = target[offset // 2 : offset // 2 + weights.numel()]
    moved = task(room[offset + 1 : offset + 1 + block.numel()], 20, 300, found)
    assert codec.run([moved], stream=True) == [INTACT]
    assert same_bits(found.view(20, 300), weights)


@pytest.mark.parametrize("threads", [1, 2])
def test_many_blocks_in_one_call(threads: int, codec: BlockCodec) -> None:
    """Law: each has its own verdict; those beside an altered one are not touched by it."""
    weights = [normal(8, 128 + 16 * i) for i in range(7)]
    blocks = [sealed(codec, w) for w in weights]
    blocks[3][100] += 1
    found = [torch.full_like(w, torch.nan) for w in weights]
    tasks = [task(b, *w.shape, f) for b, w, f in zip(blocks, weights, found, strict=True)]
    status = codec.run(tasks, num_threads=threads)
    assert status == [ALTERED if i == 3 else INTACT for i in range(7)]
    assert all(
        same_bits(f, w) for i, (f, w) in enumerate(zip(found, weights, strict=True)) if i != 3
    )


@pytest.mark.parametrize("level", available_levels())
@given(data=st.data())
def test_any_altered_byte_is_noticed(level: str, data: st.DataObject) -> None:
    codec = load_codec(level)
    block = sealed(codec, normal(9, 150))
    at = data.draw(st.integers(0, block.numel() - 1))
    block[at] ^= data.draw(st.integers(1, 255))
    assert codec.run([task(block, 9, 150, torch.empty(9, 150).bfloat16())]) == [ALTERED]
    assert codec.run([task(block, 9, 150, None)]) == [ALTERED]


def test_moved_and_cut_blocks_are_noticed(codec: BlockCodec) -> None:
    block = sealed(codec, normal(16, 128))
    weights = torch.empty(16, 128, dtype=torch.bfloat16)
    other = BlockTask(block=block, N=16, K=128, identity=IDENTITY + 1, weights=weights)
    assert codec.run([other, task(block, 8, 256, weights)]) == [FOREIGN, FOREIGN]
    assert codec.run([task(block[:-PADDING_BYTES], 16, 128, weights)]) == [ALTERED]
    assert codec.run([task(block[:10], 16, 128, weights)]) == [ALTERED]
    halves = torch.cat([block[:64], block[128:192], block[64:128], block[192:]])
    assert codec.run([task(halves, 16, 128, weights)]) == [ALTERED], "order counts"


@pytest.mark.parametrize("lie", ["codes", "count", "index", "huge"])
def test_a_forged_checksum_reads_and_writes_nothing_outside(lie: str, codec: BlockCodec) -> None:
    """Law: checksums tell accidents, not malice; memory is safe from both."""
    N, K = 12, 320
    block = sealed(codec, normal(N, K))
    index = HEADER_BYTES + N * row_bytes(K)
    if lie == "codes":  # all escapes, and none in the list
        block[HEADER_BYTES:index] = 0xFF
    elif lie == "count":
        block[28:32] = torch.frombuffer(bytearray(struct.pack("<I", 40)), dtype=torch.uint8)
    elif lie == "huge":
        block[28:32] = 0xFF
    else:
        block[index : index + 4 * index_entries(N, K)] = 0x7F
    codec.seal(block, IDENTITY)
    inside, weights = between_guards(block.numel()), between_guards(2 * N * K)
    inside.copy_(block)
    assert codec.run([task(inside, N, K, weights)]) == [ALTERED]


@pytest.mark.parametrize(("N", "K"), [(1, 1), (3, 33), (5, 128), (2, 383), (64, 64)])
def test_nothing_is_touched_outside_block_and_weights(N: int, K: int, codec: BlockCodec) -> None:
    for make in (normal, any_bits):
        weights = make(N, K)
        block = sealed(codec, weights)
        inside, found = between_guards(block.numel()), between_guards(2 * N * K)
        inside.copy_(block)
        assert codec.run([task(inside, N, K, found)], is_known=True) == [INTACT]
        assert same_bits(found.view(torch.bfloat16).view(N, K), weights)


def between_guards(num_bytes: int) -> torch.Tensor:
    """Bytes that end before a page which must not be touched."""
    page = mmap.PAGESIZE
    inner = -(-num_bytes // page) * page
    everything = torch.frombuffer(mmap.mmap(-1, inner + page), dtype=torch.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    guard = ctypes.c_void_p(everything.data_ptr() + inner)
    assert libc.mprotect(guard, ctypes.c_size_t(page), 0) == 0  # PROT_NONE
    return everything[inner - num_bytes : inner]


@pytest.mark.parametrize("num_bytes", [0, 1, 63, 64, 65, 1000, 4096])
def test_checksums_agree_and_tell_lengths_apart(num_bytes: int, codec: BlockCodec) -> None:
    data = torch.tensor(list(random.Random(0).randbytes(num_bytes)), dtype=torch.uint8)
    assert codec.checksum(data) == load_codec("torch").checksum(data)
    assert codec.checksum(data) != codec.checksum(torch.cat([data, data.new_zeros(1)]))


def test_normal_weights_take_three_quarters(codec: BlockCodec) -> None:
    """Law: at most 0.77 of the bytes; here 12 bits, few escapes, and the index: 0.752."""
    weights = normal(170, 2048)
    assert sealed(codec, weights).numel() <= 0.752 * weights.nbytes


def test_what_would_touch_foreign_memory_is_refused() -> None:
    if len(available_levels()) == 1:
        pytest.skip(NOT_BUILT)
    codec = load_codec()
    block = sealed(codec, normal(4, 128))
    for wrong, complaint in [
        (task(block, 4, 128, torch.empty(4, 127).bfloat16()), "1024 contiguous bytes"),
        (task(block, 4, 128, torch.empty(128, 4).bfloat16().t()), "contiguous"),
        (task(block.view(torch.int8), 4, 128, None), "contiguous uint8"),
        (task(block[::2], 4, 128, None), "contiguous uint8"),
    ]:
        with pytest.raises(ValueError, match=complaint):
            codec.run([wrong])
    with pytest.raises(ValueError, match="2 bytes each"):
        codec.pack(torch.zeros(4, 4))


def test_a_level_that_is_not_here_is_refused() -> None:
    with pytest.raises(ValueError, match="choose from torch"):
        load_codec("sse9")


def test_a_checkout_that_was_not_built_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: torch computes then, and the status says how to change it."""
    assert open_unpack_library(tmp_path) == NOT_BUILT
    monkeypatch.setattr(face, "open_unpack_library", lambda: NOT_BUILT)
    assert type(load_codec()).__name__ == "TorchCodec"


def test_another_library_is_not_called(tmp_path: Path) -> None:
    (tmp_path / "unpack_library.so").write_bytes(b"not a library")
    assert open_unpack_library(tmp_path) == OTHER_BUILD
    compiler = shutil.which("cc") or pytest.skip("no C compiler")
    (tmp_path / "old.c").write_text("int moe_unpack_interface(void) { return 0; }")
    other = tmp_path / "other"
    other.mkdir()
    compile_library(compiler, tmp_path / "old.c", other / "unpack_library.so")
    assert open_unpack_library(other) == OTHER_BUILD


def test_the_source_compiles_for_other_processors(tmp_path: Path) -> None:
    """Law: there plain C packs and unpacks, with equal bytes."""
    compiler = shutil.which("cc") or pytest.skip("no C compiler")
    flags = ("-DMOE_OTHER_PROCESSOR", "-Werror")
    compile_library(compiler, SOURCE, tmp_path / "library.so", *flags)
    codec = face.CpuCodec(ctypes.CDLL(str(tmp_path / "library.so")), 0)
    weights = normal(9, 300)
    assert torch.equal(sealed(codec, weights), sealed(load_codec("torch"), weights))
    assert same_bits(unpacked(codec, sealed(codec, weights), 9, 300), weights)
