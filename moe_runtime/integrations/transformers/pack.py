"""Writes a model whose experts are packed: smaller in every file, the same in every bit."""

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from moe_runtime.errors import CheckpointError, UnsupportedModelError
from moe_runtime.integrations.transformers.resolve import resolve_model
from moe_runtime.integrations.transformers.survey import survey_checkpoint
from moe_runtime.kernels.cpu.unpack import load_codec
from moe_runtime.memory.assembly import Box
from moe_runtime.memory.checkpoint import Checkpoint
from moe_runtime.memory.disk_space import check_disk_space
from moe_runtime.memory.pack_file import pack_file, restored_sha256
from moe_runtime.memory.packed_folder import (
    Manifest,
    copy_companions,
    is_packed,
    read_manifest,
)
from moe_runtime.memory.packing import PACKED_DTYPE
from moe_runtime.memory.packing_report import Packing
from moe_runtime.memory.safetensors_header import FileTensor, read_raw_header
from moe_runtime.memory.tensor_map import TensorMap

# Packed weights of bf16 experts take this share, a little more than is usual.
_EXPECTED_SHARE = 0.77
_SAMPLES_PER_FILE = 64
_SAMPLE_BYTES = 4096

OnProgress = Callable[[int, int], None]  # bytes of the source done, and in all
Rows = dict[str, list[int]]  # tensor name -> rows of each of its runs


def pack_model(
    model: str | Path,
    folder: Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    on_progress: OnProgress = lambda done, total: None,
) -> Packing:
    """Write `model`, a folder or hub id, to `folder` with its bf16 experts packed.

    File by file into a folder beside it, each read back and compared with the source; if this is
    interrupted, the same call goes on where it stopped. Raises UnsupportedModelError when there is
    nothing to pack, ValueError when `folder` holds something else, the disk is too small or what
    was begun is of another source.
    """
    started = time.perf_counter()
    resolved = resolve_model(model, revision=revision, trust_remote_code=trust_remote_code)
    if is_packed(resolved.folder):
        raise UnsupportedModelError(f"{model} is packed already; moe-runtime unpack restores it")
    checkpoint = resolved.open_checkpoint()
    survey = survey_checkpoint(resolved, checkpoint, trust_remote_code=trust_remote_code)
    if survey.tensor_map.is_scaled:
        raise UnsupportedModelError(
            f"the experts of {model} are quantised ({', '.join(survey.tensor_map.formats())}), and "
            "packing works on the exponents of bfloat16 alone: there is nothing to pack; load the "
            "model as it is"
        )
    rows = expert_rows(survey.tensor_map)
    if not rows:
        raise UnsupportedModelError(
            f"{model} has no experts in bfloat16; packing works on the exponents of bfloat16 alone"
        )
    fingerprint = fingerprint_of(checkpoint)
    if _is_done(folder, fingerprint):
        manifest = read_manifest(folder)
    else:
        manifest = _write(checkpoint, folder, rows, fingerprint, on_progress)
    num_unpaid = len(rows.keys() - {n for file in manifest.files.values() for n in file.runs})
    seconds = time.perf_counter() - started
    return Packing.of(folder, manifest, num_unpaid=num_unpaid, seconds=seconds)


def expert_rows(tensor_map: TensorMap) -> Rows:
    """How many rows each run of each bf16 tensor of experts has.

    A run is what one expert needs of a tensor, so that it can be read alone. Vectors, such as
    biases, and tensors that hold anything else stay out.
    """
    spans: dict[FileTensor, set[tuple[int, int]]] = {}
    for layer in tensor_map.layers:
        for spec in layer.layout.parameters:
            if len(spec.shape) < 2:
                continue
            for box in layer.parameters[spec.name].boxes:
                source = box.source
                if source.dtype == PACKED_DTYPE and len(source.shape) >= 2:
                    spans.setdefault(source, set()).update(_expert_spans(box))
    found = {}
    for source, parts in spans.items():
        rows = _tiling_rows(source, sorted(parts))
        if rows is not None:
            found[source.name] = rows
    return found


def _expert_spans(box: Box) -> list[tuple[int, int]]:
    """First and last element, in the source, of each expert of a box `[E, ...]`."""
    inner = zip(box.size[1:], box.stride[1:], strict=True)
    length = sum((size - 1) * stride for size, stride in inner)
    first = [box.offset + e * box.stride[0] for e in range(box.size[0])]
    return [(start, start + length) for start in first]


def _tiling_rows(source: FileTensor, spans: Sequence[tuple[int, int]]) -> list[int] | None:
    """Rows of runs that hold the spans and tile `source`, or None if there are none such."""
    merged: list[list[int]] = []
    for first, last in spans:
        if merged and first <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], last)
        else:
            merged.append([first, last])
    num_columns, position = source.shape[-1], 0
    for first, last in merged:
        if first != position or (last + 1) % num_columns:
            return None
        position = last + 1
    if position * 2 != source.num_bytes:
        return None
    return [(last + 1 - first) // num_columns for first, last in merged]


def fingerprint_of(checkpoint: Checkpoint) -> str:
    """Says which weights these are: names, sizes, headers, and samples of the bytes of each file.

    Not of every byte: that would read the model once more. Each packed file is compared with its
    source by the SHA-256 of all of it.
    """
    digest = hashlib.sha256()
    for file in checkpoint.files():
        raw, file_bytes = read_raw_header(file)
        digest.update(f"{file.name} {file_bytes} {len(raw)} ".encode())
        digest.update(raw)
        with file.open("rb") as reader:
            for i in range(_SAMPLES_PER_FILE):
                reader.seek(i * max(file_bytes - _SAMPLE_BYTES, 0) // (_SAMPLES_PER_FILE - 1))
                digest.update(reader.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _is_done(folder: Path, fingerprint: str) -> bool:
    """Whether `folder` holds the finished packing. ValueError when it holds anything else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if is_packed(folder) and read_manifest(folder).fingerprint == fingerprint:
        return True
    what = "a packing of another source" if is_packed(folder) else "files"
    raise ValueError(f"{folder} holds {what}; name a folder that is empty or does not exist")


def _write(
    checkpoint: Checkpoint, folder: Path, rows: Rows, fingerprint: str, on_progress: OnProgress
) -> Manifest:
    partial = folder.with_name(f"{folder.name}.partial")
    files = dict(_begun(partial, fingerprint).files)
    sources = checkpoint.files()
    total_bytes = sum(file.stat().st_size for file in sources)
    done_bytes = sum(file.source_bytes for file in files.values())
    packed_bytes = sum(
        tensor.num_bytes
        for tensor in checkpoint.values()
        if tensor.name in rows and tensor.file.name not in files
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    check_disk_space(
        partial,
        total_bytes - done_bytes - int((1 - _EXPECTED_SHARE) * packed_bytes),
        remedy="name a folder on another disk, or make room: what is packed already is kept",
    )
    partial.mkdir(exist_ok=True)
    Manifest(fingerprint=fingerprint, files=files).write(partial)
    codec = load_codec()

    def on_bytes(num_bytes: int) -> None:
        nonlocal done_bytes
        done_bytes += num_bytes
        on_progress(min(done_bytes, total_bytes), total_bytes)

    for source in sources:
        if source.name in files:
            continue
        target = partial / source.name
        made = pack_file(source, target, rows, fingerprint, codec, on_bytes)
        manifest = Manifest(fingerprint=fingerprint, files={**files, source.name: made})
        if restored_sha256(target, manifest, codec, lambda piece: None) != made.source_sha256:
            raise CheckpointError(
                f"{target} does not give back {source}: the disk or the memory of this machine "
                "loses bits, or the source changed; check both, then pack again"
            )
        files[source.name] = made
        manifest.write(partial)
    copy_companions(checkpoint.folder, partial)
    if folder.exists():
        folder.rmdir()  # it is empty
    partial.rename(folder)
    return Manifest(fingerprint=fingerprint, files=files)


def _begun(partial: Path, fingerprint: str) -> Manifest:
    """What an interrupted run has finished; nothing, if there was none."""
    if not partial.exists():
        return Manifest(fingerprint=fingerprint, files={})
    if not is_packed(partial):
        raise ValueError(f"{partial} is in the way; remove it, or name another output folder")
    begun = read_manifest(partial)
    if begun.fingerprint != fingerprint:
        raise ValueError(
            f"{partial} is the beginning of a packing of another source (fingerprint "
            f"{begun.fingerprint[:12]}, not {fingerprint[:12]}); remove it, or name another folder"
        )
    return begun
