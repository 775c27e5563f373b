"""A mapped tensor has the file's bytes, and the file keeps them."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_runtime.errors import CheckpointError, ExpertReadError
from moe_runtime.memory.mapped_tensor import MappedTensor
from moe_runtime.memory.safetensors_header import read_header


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Tensors on both sides of page borders, of several dtypes."""
    file = tmp_path / "model.safetensors"
    noise = torch.randn(700, 33, generator=torch.Generator().manual_seed(0))
    save_file(
        {"f32": noise, "bf16": noise.bfloat16(), "f16": noise.half(), "one": noise[0].clone()}, file
    )
    return file


def test_it_has_the_bytes_of_the_file(file: Path) -> None:
    expected = load_file(file)
    for name, place in read_header(file).items():
        mapped = MappedTensor(place)
        mapped.check()
        assert mapped.tensor.dtype == expected[name].dtype
        assert torch.equal(mapped.tensor, expected[name])


def test_writing_to_it_leaves_the_file_as_it_is(file: Path) -> None:
    before = file.read_bytes()
    mapped = MappedTensor(read_header(file)["f16"])
    mapped.tensor.zero_()
    assert not mapped.tensor.any()
    assert file.read_bytes() == before


def test_it_lives_when_the_file_is_replaced(file: Path) -> None:
    expected = load_file(file)["bf16"].clone()
    mapped = MappedTensor(read_header(file)["bf16"])
    file.rename(file.with_suffix(".old"))
    save_file({"other": torch.zeros(2)}, file)
    mapped.check()
    assert torch.equal(mapped.tensor, expected)


def test_a_file_that_changes_raises_before_its_pages_are_touched(file: Path) -> None:
    """Touching pages behind the end of a file would end the process."""
    mapped = MappedTensor(read_header(file)["f32"])
    os.truncate(file, 5000)
    with pytest.raises(ExpertReadError, match=r"changed while in use \(f32 is mapped at offset"):
        mapped.check()


def test_no_file_stays_open_and_no_page_stays_mapped(file: Path) -> None:
    def maps() -> str:
        return Path("/proc/self/maps").read_text()

    before = len(list(Path("/proc/self/fd").iterdir()))
    mapped = MappedTensor(read_header(file)["f32"])
    part = mapped.tensor[1:3]
    del mapped
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert str(file) in maps()
    del part
    assert str(file) not in maps()


def test_a_shortened_or_absent_file_raises(file: Path) -> None:
    place = max(read_header(file).values(), key=lambda place: place.offset)
    os.truncate(file, place.offset)
    with pytest.raises(CheckpointError, match=r"ends inside .*; download it again"):
        MappedTensor(place)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"mapping .* failed: No such file"):
        MappedTensor(place)
