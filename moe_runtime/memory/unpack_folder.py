"""Gives back the model that a packed folder was made of, equal in every byte."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from moe_runtime.errors import CheckpointError
from moe_runtime.kernels.cpu.unpack import load_codec
from moe_runtime.memory.anonymous_memory import Blob
from moe_runtime.memory.checkpoint import Checkpoint
from moe_runtime.memory.disk_space import check_disk_space
from moe_runtime.memory.pack_file import restored_sha256
from moe_runtime.memory.packed_folder import copy_companions, is_packed, read_manifest
from moe_runtime.memory.packing_report import Packing

OnProgress = Callable[[int, int], None]  # bytes restored, bytes in all


def unpack_folder(
    packed: Path, folder: Path, *, on_progress: OnProgress = lambda done, total: None
) -> Packing:
    """Write the source of `packed` to `folder`, which must be empty or not exist.

    Every file is compared with the SHA-256 of its source; nothing is left at `folder` unless all
    agree. Raises CheckpointError when `packed` is no packed folder, or was altered, and ValueError
    when `folder` is taken or the disk too small.
    """
    started = time.perf_counter()
    if not is_packed(packed):
        raise CheckpointError(
            f"{packed} holds no packing.json; give a folder that moe-runtime pack has written"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} holds files; name a folder that is empty or does not exist")
    manifest = read_manifest(packed)
    sources = Checkpoint.open(packed).files()  # looks at every header
    total_bytes = sum(file.source_bytes for file in manifest.files.values())
    partial = folder.with_name(f"{folder.name}.partial")
    if partial.exists():
        raise ValueError(f"{partial} is in the way; remove it, or name another output folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    check_disk_space(partial, total_bytes, remedy="name a folder on another disk, or make room")
    partial.mkdir()
    codec, done_bytes = load_codec(), 0
    try:
        for file in sources:
            with (partial / file.name).open("wb") as writer:

                def write(piece: Blob) -> None:
                    nonlocal done_bytes
                    writer.write(piece.data)
                    done_bytes += piece.nbytes
                    on_progress(done_bytes, total_bytes)

                found = restored_sha256(file, manifest, codec, write)
                writer.flush()
                os.fsync(writer.fileno())
            if found != manifest.files[file.name].source_sha256:
                raise CheckpointError(
                    f"{file} was altered: it does not give back the file that it was made of; copy "
                    "the folder again, or pack the model again"
                )
        copy_companions(packed, partial)
        if folder.exists():
            folder.rmdir()  # it is empty
        partial.rename(folder)
    except BaseException:  # Ctrl-C included: gigabytes that nobody can use
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Packing.of(folder, manifest, num_unpaid=0, seconds=time.perf_counter() - started)
