"""Laws of safetensors headers: the library's answer, or a CheckpointError that names the file."""

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from moe_runtime.errors import CheckpointError
from moe_runtime.memory.read_tensor import read_tensor
from moe_runtime.memory.safetensors_header import MAX_HEADER_BYTES, FileTensor, read_header

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip

shapes = st.lists(st.integers(0, 5), max_size=3)
names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8)


def header_and_data(file: Path) -> tuple[dict[str, Any], bytes]:
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write(file: Path, header: object, data: bytes) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A sound file: `a` F32 [2, 3] at 0:24, `b` BF16 [4] at 24:32."""
    file = tmp_path / "sound.safetensors"
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    }
    write(file, header, bytes(range(32)))
    assert read_header(file).keys() == {"a", "b"}
    return file


@given(tensors=st.dictionaries(names, st.tuples(shapes, st.sampled_from(DTYPES)), max_size=6))
@settings(max_examples=60)
def test_agrees_with_the_library(
    tmp_path: Path, tensors: dict[str, tuple[list[int], torch.dtype]]
) -> None:
    """Law: names, dtypes, shapes and bytes are those that the safetensors library reads."""
    file = tmp_path / "random.safetensors"
    tensors.pop("__metadata__", None)
    generator = torch.Generator().manual_seed(len(tensors))
    values = {
        name: torch.randint(0, 2 if dtype is torch.bool else 100, shape, generator=generator).to(
            dtype
        )
        for name, (shape, dtype) in tensors.items()
    }
    save_file(values, file, metadata={"format": "pt"})
    found = read_header(file)
    with safe_open(file, "pt") as library:
        assert set(found) == set(library.keys())
        for name, place in found.items():
            assert place.dtype == library.get_slice(name).get_dtype()
            assert list(place.shape) == library.get_slice(name).get_shape()
            assert torch.equal(read_tensor(place), library.get_tensor(name))


def with_entry(name: str, **changes: object) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        header, data = header_and_data(file)
        header[name] |= changes
        write(file, header, data)

    return damage


def with_header(header: object) -> Callable[[Path], None]:
    return lambda file: write(file, header, b"")


def without_field(file: Path) -> None:
    header, data = header_and_data(file)
    del header["a"]["dtype"]
    write(file, header, data)


def claim(num_bytes: int) -> Callable[[Path], None]:
    return lambda file: file.write_bytes(struct.pack("<Q", num_bytes) + file.read_bytes()[8:])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "does not exist"),
    "empty": (lambda f: f.write_bytes(b""), "it has 0 bytes, too few for a header"),
    "short": (lambda f: f.write_bytes(b"1234567"), "it has 7 bytes, too few for a header"),
    "header cut": (lambda f: f.write_bytes(f.read_bytes()[:40]), "claims"),
    "data cut": (lambda f: f.write_bytes(f.read_bytes()[:-1]), "truncated"),
    "trailing": (lambda f: f.write_bytes(f.read_bytes() + b"xy"), "2 bytes follow its last tensor"),
    "absurd length": (claim(2**63 + 5), "header claims 9223372036854775813 bytes"),
    "length past the end": (claim(10_000), "header claims 10000 bytes"),
    "header too short": (claim(20), "not JSON"),
    "not JSON": (with_header(b"{not json"), "not JSON"),
    "not UTF-8": (with_header(b'{"\xff\xfe": 1}'), "not JSON"),
    "bottomless": (with_header(b"[" * 100_000), "not JSON"),
    "a list": (with_header([]), "not a JSON object"),
    "entry not an object": (with_header({"a": 3}), "'a' lacks dtype"),
    "field lacking": (without_field, "'a' lacks dtype"),
    "unknown dtype": (with_entry("a", dtype="F31"), "unknown dtype 'F31'"),
    "dtype not text": (with_entry("a", dtype=["F32"]), "unknown dtype"),
    "wrong dtype": (with_entry("a", dtype="F64"), "does not fill its 24 bytes"),
    "wrong shape": (with_entry("a", shape=[2, 4]), "does not fill its 24 bytes"),
    "negative shape": (with_entry("a", shape=[-2, -3]), r"'a' has shape \[-2, -3\]"),
    "fractional shape": (with_entry("a", shape=[2.0, 3]), "'a' has shape"),
    "boolean shape": (with_entry("b", shape=[True, 4]), "'b' has shape"),
    "huge shape": (with_entry("a", shape=[2**62, 2**62]), "does not fill its 24 bytes"),
    "overflowing shape": (with_entry("a", shape=[2**63, 2, 0, 1]), "does not fill its 24 bytes"),
    "offsets reversed": (with_entry("a", data_offsets=[24, 0]), r"data_offsets \[24, 0\]"),
    "one offset": (with_entry("a", data_offsets=[24]), "data_offsets"),
    "negative offset": (with_entry("a", data_offsets=[-24, 0]), "data_offsets"),
    "overlap": (with_entry("b", data_offsets=[20, 28]), "tensors 'a' and 'b' overlap"),
    "same place": (with_entry("b", data_offsets=[0, 8]), "overlap"),
    "gap": (with_entry("b", data_offsets=[25, 33]), "gap of 1 bytes before b"),
    "gap at the start": (
        with_header({"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}),
        "gap of 1 bytes",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(file: Path, damage: str) -> None:
    """Law: every kind of damage raises CheckpointError naming the file and what is wrong."""
    act, message = DAMAGES[damage]
    act(file)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(file)
    assert str(file) in str(caught.value)
    assert "again" in str(caught.value)


def test_absurd_length_reads_nothing(tmp_path: Path) -> None:
    """Law: a header longer than the format allows is refused before any memory is taken for it."""
    file = tmp_path / "sparse.safetensors"
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
        stream.truncate(2 * MAX_HEADER_BYTES)
    with pytest.raises(CheckpointError, match=f"the format allows {MAX_HEADER_BYTES}"):
        read_header(file)


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    """Law: what the system will not read raises CheckpointError too."""
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path)


def sound_bytes() -> bytes:
    return save({"w": torch.ones(3, 4), "bias": torch.zeros(5, dtype=torch.bfloat16)})


@given(
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=4)
)
@settings(max_examples=400)
def test_flipped_bytes_never_surprise(tmp_path: Path, flips: list[tuple[int, int]]) -> None:
    """Law: with any header bytes flipped a file reads consistently or raises CheckpointError."""
    file = tmp_path / "flipped.safetensors"
    raw = np.frombuffer(sound_bytes(), np.uint8).copy()
    header_bytes = 8 + struct.unpack("<Q", raw[:8].tobytes())[0]
    for place, mask in flips:
        raw[place % header_bytes] ^= mask
    file.write_bytes(raw.tobytes())
    try:
        found = read_header(file)
    except CheckpointError:
        with pytest.raises(CheckpointError, match=re.escape(str(file))):
            read_header(file)
        return
    assert_consistent(found, len(raw))
    try:
        with safe_open(file, "pt") as library:
            assert set(library.keys()) == set(found)
    except SafetensorError:
        pass  # the library is stricter about metadata and names


def assert_consistent(found: dict[str, FileTensor], file_bytes: int) -> None:
    """Tensors follow each other to the end of the file."""
    end = None
    for tensor in sorted(found.values(), key=lambda t: (t.offset, t.num_bytes)):
        assert end is None or tensor.offset == end
        end = tensor.offset + tensor.num_bytes
    assert end in (None, file_bytes)


def test_truncation_while_reading_is_named(file: Path) -> None:
    """Law: a dense tensor whose file shrank since its header was read raises CheckpointError."""
    place = read_header(file)["b"]
    with file.open("r+b") as stream:
        stream.truncate(place.offset + 3)
    with pytest.raises(CheckpointError, match=f"ends inside b at offset {place.offset + 3}"):
        read_tensor(place)


def test_quantised_dense_tensor_is_named(file: Path) -> None:
    """Law: a dtype that dense weights do not have raises CheckpointError naming the tensor."""
    header, data = header_and_data(file)
    header["b"] = {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [24, 32]}
    write(file, header, data)
    with pytest.raises(CheckpointError, match=r"b \(F8_E4M3 \[8\] .* not supported"):
        read_tensor(read_header(file)["b"])
