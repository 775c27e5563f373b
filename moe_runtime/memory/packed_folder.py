"""What a folder with packed experts says of itself, and whether its files agree."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_runtime.errors import CheckpointError
from moe_runtime.kernels.packed_blocks import PADDING_BYTES
from moe_runtime.memory.packing import PACKED_DTYPE, PackedRun, PackedTensor, SealedTensor
from moe_runtime.memory.safetensors_header import (
    METADATA,
    FileTensor,
    header_object,
    parse_header,
    read_raw_header,
)

MANIFEST_NAME = "packing.json"
FORMAT = "moe_runtime.packing"
VERSION = 1
# What a model needs beside its weights, and what people want to find with it.
COMPANIONS = (
    "*.json", "*.model", "*.txt", "*.jinja", "*.py", "*.tiktoken", "*.md", "LICENSE*", "NOTICE*",
)  # fmt: skip
FILE_MARK = "moe_runtime.packing"  # in a file's own metadata: the fingerprint of its source


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedFile:
    """One safetensors file: how it lies here, and what it was made of.

    `runs` by name of packed tensor, `checksums` by name of every other. `source_header` is the JSON
    of the source's header, byte for byte.
    """

    num_bytes: int
    source_bytes: int
    source_sha256: str
    source_header: str
    runs: Mapping[str, tuple[PackedRun, ...]]
    checksums: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """`packing.json`: the source's fingerprint, and the files made so far, by name."""

    fingerprint: str
    files: Mapping[str, PackedFile]

    def write(self, folder: Path) -> None:
        """Replace the manifest of `folder`, whole or not at all."""
        files = {
            name: {
                "bytes": file.num_bytes,
                "source_bytes": file.source_bytes,
                "source_sha256": file.source_sha256,
                "source_header": file.source_header,
                "packed": {
                    tensor: [[run.num_rows, run.rows_per_block, run.block_bytes] for run in runs]
                    for tensor, runs in file.runs.items()
                },
                "checksums": {tensor: f"{value:016x}" for tensor, value in file.checksums.items()},
            }
            for name, file in self.files.items()
        }
        found = {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "files": files,
        }
        started = folder / f"{MANIFEST_NAME}.new"
        started.write_text(json.dumps(found, indent=1) + "\n")
        started.replace(folder / MANIFEST_NAME)


def is_packed(folder: Path) -> bool:
    """Whether `folder` says that its experts are packed."""
    return (folder / MANIFEST_NAME).is_file()


def read_manifest(folder: Path) -> Manifest:
    """Raises CheckpointError when it is damaged, or of a version that is not known here."""
    path = folder / MANIFEST_NAME
    try:
        found = json.loads(path.read_bytes())
        if found["format"] != FORMAT:
            raise CheckpointError(
                f"{path} is not a manifest of packed experts; pack the model again"
            )
        if found["version"] != VERSION:
            raise CheckpointError(
                f"{path} has version {found['version']} and this moe_runtime reads version "
                f"{VERSION}; update moe_runtime, or pack the model again"
            )
        return Manifest(
            fingerprint=str(found["fingerprint"]),
            files={str(name): _packed_file(entry) for name, entry in found["files"].items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(
            f"{path} is damaged; copy the folder again, or pack the model again"
        ) from None


def copy_companions(source: Path, target: Path) -> None:
    """Copy config, tokenizer and what else a model comes with; no weights, no manifest."""
    for pattern in COMPANIONS:
        for file in sorted(source.glob(pattern)):
            if file.is_file() and file.name != MANIFEST_NAME:
                shutil.copy2(file, target / file.name)


def open_packed(folder: Path, names: Mapping[str, Path]) -> dict[str, FileTensor]:
    """The tensors of a packed folder as its source has them; `names` by the file that holds each.

    Only headers are read. Raises CheckpointError when a file is truncated, is of another packing,
    or does not hold what the manifest says.
    """
    manifest = read_manifest(folder)
    by_file: dict[Path, list[str]] = {}
    for name, file in names.items():
        by_file.setdefault(file, []).append(name)
    found: dict[str, FileTensor] = {}
    for file, tensors in by_file.items():
        whole = packed_tensors(file, manifest)
        found |= {name: whole[name] for name in tensors}
    return {name: found[name] for name in names}


def packed_tensors(file: Path, manifest: Manifest) -> dict[str, FileTensor]:
    """The tensors of one file, packed or sealed. Raises CheckpointError."""
    entry = manifest.files.get(file.name)
    if entry is None:
        raise CheckpointError(
            f"{file} is not in {MANIFEST_NAME}: it is of another packing; pack the model again"
        )
    raw, file_bytes = read_raw_header(file)
    if file_bytes != entry.num_bytes:
        raise CheckpointError(
            f"{file} has {file_bytes} bytes and {MANIFEST_NAME} says {entry.num_bytes}: it is "
            "truncated or altered; copy the folder again, or pack the model again"
        )
    mark = (header_object(file, raw).get(METADATA) or {}).get(FILE_MARK)
    if mark != manifest.fingerprint:
        raise CheckpointError(
            f"{file} was packed of another source than {MANIFEST_NAME} says (fingerprints "
            f"{str(mark)[:12]} and {manifest.fingerprint[:12]}); pack the model again"
        )
    places = parse_header(file, raw, file_bytes)
    originals = parse_header(file, entry.source_header.encode(), entry.source_bytes)
    if places.keys() != originals.keys():
        raise _other_tensors(file)
    return {
        name: _packed(places[name], original, entry, manifest.fingerprint)
        for name, original in originals.items()
    }


def _packed(
    place: FileTensor, original: FileTensor, entry: PackedFile, fingerprint: str
) -> FileTensor:
    name, shape = original.name, original.shape
    if name not in entry.runs:
        if (place.dtype, place.shape) != (original.dtype, shape) or name not in entry.checksums:
            raise _other_tensors(place.file)
        return SealedTensor(
            name, place.file, place.dtype, shape, place.offset, place.num_bytes,
            entry.checksums[name],
        )  # fmt: skip
    runs = entry.runs[name]
    num_rows = original.num_bytes // 2 // shape[-1]
    if (
        original.dtype != PACKED_DTYPE
        or place.dtype != "U8"
        or sum(run.num_rows for run in runs) != num_rows
        or not 0 <= place.num_bytes - sum(run.num_bytes for run in runs) < PADDING_BYTES
    ):
        raise _other_tensors(place.file)
    return PackedTensor(
        name, place.file, original.dtype, shape, original.offset, original.num_bytes,
        place.offset, runs, fingerprint,
    )  # fmt: skip


def _packed_file(entry: Any) -> PackedFile:
    return PackedFile(
        num_bytes=int(entry["bytes"]),
        source_bytes=int(entry["source_bytes"]),
        source_sha256=str(entry["source_sha256"]),
        source_header=str(entry["source_header"]),
        runs={str(n): tuple(_run(*r) for r in runs) for n, runs in entry["packed"].items()},
        checksums={str(name): int(value, 16) for name, value in entry["checksums"].items()},
    )


def _run(num_rows: int, rows_per_block: int, block_bytes: int) -> PackedRun:
    if min(num_rows, rows_per_block, block_bytes) < 1:
        raise ValueError("a run has at least one row and one byte")
    return PackedRun(num_rows, rows_per_block, block_bytes)


def _other_tensors(file: Path) -> CheckpointError:
    return CheckpointError(
        f"{file} does not hold the tensors that {MANIFEST_NAME} says; pack the model again"
    )
