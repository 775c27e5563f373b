"""Writes a trace block by block, in memory that does not grow with it."""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from moe_runtime.errors import TraceError
from moe_runtime.trace import Trace
from moe_runtime.trace_fields import SCALARS, Array
from moe_runtime.trace_file import Member, write_npz

_READ_ROWS = 4096  # rows that pass through memory at a time when the file is put together


class TraceWriter:
    """Blocks go to a hidden folder beside `path`; `close()` turns them into the one file.

    A context manager. Leaving it after an error or an interrupt keeps what was appended, as a trace
    of its own called `T.partial.npz` beside `T.npz`: the final name never stands for a recording
    that did not finish. Only a process that is killed loses its rows, and leaves the folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.num_tokens = 0
        self._folder = tempfile.TemporaryDirectory(
            prefix=f".{self.path.name}.", dir=self.path.parent
        )
        self._first: Trace | None = None  # without rows: what every block must agree with
        self._files: dict[str, BinaryIO] = {}
        self._num_steps = 0  # one above the last step
        self._domains: dict[str, int] = {}

    @property
    def partial_path(self) -> Path:
        """Where an interrupted recording ends up."""
        return self.path.with_name(f"{self.path.stem}.partial{self.path.suffix}")

    def append(self, block: Trace) -> None:
        """Add rows. Steps go on where the last block's ended; fields must be those of the first."""
        if not block.num_tokens:
            return
        if self._first is None:
            self._first = block.select(np.arange(0))
            for name in block.arrays():
                self._files[name] = (Path(self._folder.name) / name).open("wb")
        _check_alike(self._first, block)
        step = block.step - block.step[0] + self._num_steps
        self._num_steps = int(step[-1]) + 1
        for name, array in replace(block, step=step).arrays().items():
            self._files[name].write(self._numbers(array).tobytes())
        self.num_tokens += block.num_tokens

    def close(self) -> None:
        """Put the file together under its name. Raises TraceError if nothing was appended."""
        self._finish(self.path)

    def discard(self) -> None:
        """Leave no file, when what was appended can be had again."""
        for file in self._files.values():
            file.close()
        self._folder.cleanup()

    def _finish(self, path: Path) -> None:
        for file in self._files.values():
            file.close()
        try:
            if self._first is None:
                raise TraceError(f"trace {path} would be empty: nothing was recorded")
            write_npz(path, [*self._arrays(self._first), *_scalars(self._first)])
        finally:
            self._folder.cleanup()

    def __enter__(self) -> "TraceWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        elif self._first is None:
            self.discard()
        else:
            self._finish(self.partial_path)

    def _numbers(self, array: Array) -> Array:
        """Text has no fixed width until the last block has come, so its number stands for it."""
        if array.dtype.kind != "U":
            return array
        names, indices = np.unique(array, return_inverse=True)
        numbers = [self._domains.setdefault(str(name), len(self._domains)) for name in names]
        return np.array(numbers, np.int32)[indices]

    def _arrays(self, first: Trace) -> Iterator[Member]:
        names = np.array(list(self._domains), np.str_)
        for name, empty in first.arrays().items():
            is_text = empty.dtype.kind == "U"
            yield Member(
                name=name,
                dtype=names.dtype if is_text else empty.dtype,
                shape=(self.num_tokens, *empty.shape[1:]),
                blocks=self._blocks(name, empty, names if is_text else None),
            )

    def _blocks(self, name: str, empty: Array, names: Array | None) -> Iterator[Array]:
        dtype = empty.dtype if names is None else np.dtype(np.int32)
        row_bytes = dtype.itemsize * int(np.prod(empty.shape[1:]))
        with (Path(self._folder.name) / name).open("rb") as file:
            while raw := file.read(row_bytes * _READ_ROWS):
                block: Array = np.frombuffer(raw, dtype)
                yield block if names is None else names[block]


def _scalars(trace: Trace) -> list[Member]:
    return [Member.of(name, getattr(trace, name)) for name in SCALARS]


def _check_alike(first: Trace, block: Trace) -> None:
    for what, ours, theirs in _comparisons(first, block):
        if ours != theirs:
            raise TraceError(
                f"a block of the trace has {what} {theirs}, and the blocks before it {ours}; "
                "one trace holds one model, recorded in one way"
            )


def _comparisons(first: Trace, block: Trace) -> Iterator[tuple[str, Any, Any]]:
    yield "fields", ", ".join(first.arrays()), ", ".join(block.arrays())
    for name in SCALARS:
        yield name, getattr(first, name), getattr(block, name)
    for name, array in first.arrays().items():
        yield f"{name} of row shape", array.shape[1:], getattr(block, name).shape[1:]
