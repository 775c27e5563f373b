"""Laws of a checkpoint's digest: it changes with the files, and is kept only while they do not."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_runtime.memory import checkpoint_digest as module
from moe_runtime.memory.checkpoint_digest import checkpoint_digest

OLD_NS = 10**18
SIZE = 300_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files of a checkpoint, written long ago."""
    found = tmp_path / "model"
    found.mkdir()
    for number in range(2):
        path = found / f"model-{number}.safetensors"
        path.write_bytes(os.urandom(SIZE))
        os.utime(path, ns=(OLD_NS, OLD_NS))
    return found


@pytest.fixture
def num_digests(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How often files were read for one."""
    count = [0]
    real = module._digest

    def counted(paths: list[Path]) -> str:
        count[0] += 1
        return real(paths)

    monkeypatch.setattr(module, "_digest", counted)
    return lambda: count[0]


def test_a_kept_digest_costs_no_read(
    folder: Path, tmp_path: Path, num_digests: Callable[[], int]
) -> None:
    """Law: while nothing changes files are read once, and what is kept is what they give."""
    cache = tmp_path / "cache"
    first = checkpoint_digest(folder, cache)
    assert checkpoint_digest(folder, cache) == first
    assert num_digests() == 1
    assert checkpoint_digest(folder) == first
    assert num_digests() == 2
    assert len(list(cache.iterdir())) == 1


def rewrite(path: Path) -> None:
    """Other bytes of the same number, in place, a nanosecond later."""
    path.write_bytes(os.urandom(SIZE))
    os.utime(path, ns=(OLD_NS, OLD_NS + 1))


def replace(path: Path) -> None:
    """Another file with the size and the time of this one."""
    other = path.with_suffix(".new")
    other.write_bytes(os.urandom(SIZE))
    os.utime(other, ns=(OLD_NS, OLD_NS))
    other.replace(path)


def lengthen(path: Path) -> None:
    """One byte more, at the same time."""
    with path.open("ab") as file:
        file.write(b"!")
    os.utime(path, ns=(OLD_NS, OLD_NS))


@pytest.mark.parametrize("change", [rewrite, replace, lengthen, Path.unlink])
def test_a_changed_file_is_read_again(
    folder: Path, tmp_path: Path, change: Callable[[Path], object]
) -> None:
    """Law: another time, inode, size or set of files gives the digest of what is there now."""
    before = checkpoint_digest(folder, tmp_path)
    change(folder / "model-1.safetensors")
    after = checkpoint_digest(folder, tmp_path)
    assert after != before
    assert after == checkpoint_digest(folder)


def test_files_of_just_now_are_not_relied_on(folder: Path, tmp_path: Path) -> None:
    """Law: a digest is kept only of files that could not change within their time's last digit."""
    os.utime(folder / "model-0.safetensors")
    checkpoint_digest(folder, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"digest": "ab"}', "\udcff"])
def test_a_damaged_file_is_ignored(
    folder: Path, tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Law: what is kept and damaged costs one line and the reads, and is written anew."""
    found = checkpoint_digest(folder, tmp_path)
    (kept,) = tmp_path.glob("digest-*.json")
    kept.write_bytes(text.encode(errors="surrogateescape"))
    with caplog.at_level(logging.WARNING, "moe_runtime"):
        assert checkpoint_digest(folder, tmp_path) == found
    assert f"{kept} is ignored" in caplog.text
    caplog.clear()
    assert checkpoint_digest(folder, tmp_path) == found
    assert not caplog.text


def test_a_folder_that_cannot_be_written_to_breaks_nothing(folder: Path, tmp_path: Path) -> None:
    """Law: where nothing can be kept the digest is found all the same."""
    cache = tmp_path / "file"
    cache.write_text("no folder")
    assert checkpoint_digest(folder, cache / "cache") == checkpoint_digest(folder)
