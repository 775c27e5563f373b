"""Refuses an output that could not be written, before work starts that would be lost with it."""

import os
import tempfile
from pathlib import Path


def check_writable(path: Path) -> None:
    """Raise ValueError, with the path and a remedy, unless a file can be written there."""
    if path.is_dir():
        raise ValueError(f"output {path} is a folder; name a file in it")
    folder = path.parent
    if not folder.is_dir():
        raise ValueError(
            f"output {path}: there is no folder {folder}; create it, or write elsewhere"
        )
    if path.exists() and not os.access(path, os.W_OK):
        raise ValueError(f"output {path} is write-protected; allow writing, or name another file")
    try:
        # Only trying tells: a file system may be full or read-only whatever its permissions say.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"output {path} cannot be written: {error.strerror}; write to another folder"
        ) from error


def check_folder(path: Path) -> None:
    """Raise ValueError, with the path and a remedy, unless a folder can be made there."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"output {path} is a file; name a folder")
    if path.absolute().parent == path.absolute():
        raise ValueError(f"output {path} is the root of a disk; name a folder in it")
    check_writable(path.absolute().parent / f".{path.absolute().name}.probe")
