"""A file that cannot be read or that changes while in use stops generation; no token is wrong."""

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import moe_runtime
from moe_runtime.errors import ExpertReadError
from tests.tiny_checkpoint import save_mixtral

NUM_TOKENS = 8
DISK_THREADS = "moe-runtime-disk"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_mixtral(tmp_path / "model")


@pytest.fixture(params=[False, True], ids=["direct", "page-cache"])
def model(folder: Path, request: pytest.FixtureRequest) -> Iterator[PreTrainedModel]:
    loaded = moe_runtime.load(folder, expert_memory="40%", exact=True, page_cache=request.param)
    yield loaded
    moe_runtime.handle(loaded).close()


def weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def tokens(model: PreTrainedModel, first: int = 7) -> list[int]:
    inputs = torch.tensor([[first, 50, 60]])
    output: Any = model.generate(  # type: ignore[operator]
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=NUM_TOKENS, do_sample=False
    )
    found: list[int] = output[0, inputs.shape[1] :].tolist()
    return found


def touch_later(file: Path) -> None:
    """Move the time of change on, as a slow clock might not have."""
    later = file.stat().st_mtime_ns + 10**9
    os.utime(file, ns=(later, later))


def test_truncated_while_in_use(model: PreTrainedModel, folder: Path) -> None:
    """Law: the error names file and offset, and comes again until the model is loaded again."""
    whole = weights(folder).read_bytes()
    expected = tokens(model)
    with weights(folder).open("r+b") as stream:
        stream.truncate(len(whole) // 3)
    for _ in range(2):
        with pytest.raises(
            ExpertReadError, match=r"model\.safetensors.* offset \d+.*load the model"
        ):
            tokens(model)
    weights(folder).write_bytes(whole)
    with moe_runtime.handle(moe_runtime.load(folder, expert_memory="40%", exact=True)) as again:
        assert tokens(again._root) == expected


def test_overwritten_while_in_use(model: PreTrainedModel, folder: Path) -> None:
    """Law: same length, other bytes: nothing is computed from them."""
    tokens(model)
    size = weights(folder).stat().st_size
    with weights(folder).open("r+b") as stream:
        stream.seek(size // 4)
        stream.write(os.urandom(size // 2))
    touch_later(weights(folder))
    with pytest.raises(
        ExpertReadError, match=r"model\.safetensors changed while in use.* offset \d"
    ):
        tokens(model)


def test_replaced_or_deleted_while_in_use(model: PreTrainedModel, folder: Path) -> None:
    """Law: the open file is still the old one, so the tokens are too."""
    expected = tokens(model)
    other = save_mixtral(folder.parent / "other", num_hidden_layers=2)
    weights(other).replace(weights(folder))
    assert tokens(model) == expected
    weights(folder).unlink()
    assert tokens(model) == expected


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_disk_error(
    model: PreTrainedModel, folder: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Law: the system's words are passed on; once the disk is well the tokens are right again."""
    expected = tokens(model)

    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        with pytest.raises(ExpertReadError, match=rf"offset \d+ failed: {os.strerror(code)}"):
            tokens(model, first=9)
    assert tokens(model) == expected


def test_short_reads_are_read_on(
    model: PreTrainedModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: a system call may return less than asked; half-read weights are never used."""
    expected = tokens(model)
    whole_read = os.preadv

    def read_some(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        first = buffers[0]
        return whole_read(descriptor, [first[: max(4096, len(first) // 2 // 4096 * 4096)]], offset)

    monkeypatch.setattr(os, "preadv", read_some)
    assert tokens(model, first=9) != []
    assert tokens(model) == expected


def test_no_thread_outlives_an_error(folder: Path) -> None:
    before = {thread.name for thread in threading.enumerate() if DISK_THREADS in thread.name}
    loaded = moe_runtime.load(folder, expert_memory="40%", exact=True)
    with weights(folder).open("r+b") as stream:
        stream.truncate(1000)
    with pytest.raises(ExpertReadError):
        tokens(loaded)
    moe_runtime.handle(loaded).close()
    after = {thread.name for thread in threading.enumerate() if DISK_THREADS in thread.name}
    assert after <= before
