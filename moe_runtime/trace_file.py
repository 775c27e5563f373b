"""Arrays in an `.npz` file, without pickles: read with every damage named, written in one piece."""

import os
import tempfile
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_runtime.errors import TraceError

Array = np.ndarray[Any, Any]

# A fifth of the time of zlib's default, for a file 3 % larger (gpt-oss-20b, 142,766 tokens).
_COMPRESSION_LEVEL = 4
# Activations lose a quarter of their bytes, at 17 MB/s: less than it costs to wait for.
_STORED = frozenset({"hidden"})
# What zipfile and numpy raise on a damaged member.
_DAMAGE = (
    ValueError, RuntimeError, EOFError, OSError, MemoryError, zlib.error, zipfile.BadZipFile,
)  # fmt: skip
_REMEDY = "copy it again, or record the trace again"


def read_npz(path: Path, leave_out: Collection[str] = ()) -> dict[str, Array]:
    """The arrays of `path` by name, but for those in `leave_out`. Raises TraceError."""
    try:
        with path.open("rb") as file:
            start = file.read(6)
        is_zip = zipfile.is_zipfile(path)
    except OSError as error:
        raise TraceError(f"trace {path} cannot be read: {error.strerror}") from error
    if not is_zip:
        raise TraceError(_not_a_zip(path, start))
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member.removesuffix(".npy") for member in archive.namelist()]
            if not all(name.isprintable() for name in members):
                raise zipfile.BadZipFile("its index holds names that cannot be printed")
            return {
                name: _read_member(path, archive, name) for name in members if name not in leave_out
            }
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise TraceError(f"trace {path} is damaged ({error}); {_REMEDY}") from error


def _read_member(path: Path, archive: zipfile.ZipFile, name: str) -> Array:
    if f"{name}.npy" not in archive.namelist():
        raise TraceError(f"trace {path}: {name} is not a NumPy array; remove it from the archive")
    try:
        with archive.open(f"{name}.npy") as file:
            found: Array = np.lib.format.read_array(file, allow_pickle=False)
            if file.read(1):  # to the end, where the checksum is compared
                raise ValueError("more bytes than its shape asks for")
    except _DAMAGE as error:
        if "allow_pickle" in str(error):
            raise TraceError(
                f"trace {path}: {name} holds pickled Python objects, which could run code and are "
                "not read; save it as plain numbers or text"
            ) from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TraceError(f"trace {path}: {name} is damaged ({reason}); {_REMEDY}") from error
    return found


def _not_a_zip(path: Path, start: bytes) -> str:
    if not start:
        return f"trace {path} is empty; {_REMEDY}"
    if start.startswith(b"PK"):
        return f"trace {path} is cut short: the index at the end of an .npz is missing; {_REMEDY}"
    if start.startswith(b"\x93NUMPY"):
        return (
            f"trace {path} is a single array; save it with numpy.savez_compressed(path, topk=...)"
        )
    return (
        f"trace {path} is not an .npz archive; other formats go through `moe-runtime trace import`"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """An array to write: `shape` in all, rows in `blocks` one after the other."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    blocks: Iterable[Array]

    @classmethod
    def of(cls, name: str, value: Any) -> "Member":
        """The whole of `value` as one block."""
        array = np.ascontiguousarray(value).reshape(np.shape(value))
        assert not array.dtype.hasobject, f"{name} would need a pickle"
        return cls(name=name, dtype=array.dtype, shape=array.shape, blocks=[array])


def write_npz(path: Path, members: Sequence[Member]) -> None:
    """Write `members` to `path`, which is replaced in one go once everything is on disk."""
    with (
        _replacing(path) as unfinished,
        zipfile.ZipFile(unfinished, "w", compresslevel=_COMPRESSION_LEVEL) as archive,
    ):
        for member in members:
            is_stored = member.name in _STORED
            archive.compression = zipfile.ZIP_STORED if is_stored else zipfile.ZIP_DEFLATED
            # Opened by name, a member is dated 1980: equal traces make equal files.
            with archive.open(f"{member.name}.npy", "w", force_zip64=True) as file:
                header = {
                    "descr": np.lib.format.dtype_to_descr(member.dtype),
                    "fortran_order": False,
                    "shape": member.shape,
                }
                np.lib.format.write_array_header_1_0(file, header)
                for block in member.blocks:
                    file.write(np.ascontiguousarray(block, member.dtype).tobytes())


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A new file beside `path` that takes its name when all went well, and is removed if not."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    unfinished = Path(name)
    try:
        yield unfinished
        unfinished.chmod(0o666 & ~_umask())  # mkstemp gives 0600
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
