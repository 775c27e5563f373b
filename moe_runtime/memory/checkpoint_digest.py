"""Tells checkpoints apart without reading them whole."""

import hashlib
import json
import logging
import os
import tempfile
import time
from pathlib import Path

logger = logging.getLogger("moe_runtime")

_SAMPLES = 64
_SAMPLE_BYTES = 4096
# A file that was written to again may show the same time, on file systems that count in seconds.
_SETTLED_NS = 3 * 10**9

State = list[list[str | int]]  # of each file


def checkpoint_digest(folder: Path, cache: Path | None = None) -> str:
    """16 hexadecimal digits: of the sizes of a checkpoint's weight files and samples of them.

    Reads a little of each file, however large: its head, where the tensors' names and shapes are,
    and blocks at even distances. In the folder `cache` it is kept, and found again without a read
    while the files have the sizes, times and inodes that they had.
    """
    paths = sorted(folder.glob("*.safetensors"))
    if cache is None:
        return _digest(paths)
    kept = _kept_in(cache, folder)
    state = _state(paths)
    found = _recall(kept, state)
    if found is None:
        found = _digest(paths)
        newest = max((path.stat().st_mtime_ns for path in paths), default=0)
        if _state(paths) == state and time.time_ns() - newest > _SETTLED_NS:
            _keep(kept, state, found)
    return found


def _digest(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for sample in range(_SAMPLES):
                file.seek(size * sample // _SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def _state(paths: list[Path]) -> State:
    found = [(path.name, path.stat()) for path in paths]
    return [[name, at.st_size, at.st_mtime_ns, at.st_ino] for name, at in found]


def _kept_in(cache: Path, folder: Path) -> Path:
    place = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    return cache / f"digest-{place}.json"


def _recall(kept: Path, state: State) -> str | None:
    """The digest in `kept`, if it is that of files in `state`."""
    try:
        about = json.loads(kept.read_text(encoding="utf-8"))
        found = about["digest"] if about["files"] == state else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        logger.warning("digest of the checkpoint: %s is ignored (%s)", kept, reason)
        return None
    return found if isinstance(found, str) else None


def _keep(kept: Path, state: State, digest: str) -> None:
    """Whole or not at all; a folder that cannot be written to costs the reads once more."""
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(prefix=".partial-", dir=kept.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump({"digest": digest, "files": state}, file)
            Path(partial).replace(kept)
        finally:
            Path(partial).unlink(missing_ok=True)
    except OSError as error:
        logger.info("digest of the checkpoint: %s is not written (%s)", kept, error.strerror)
