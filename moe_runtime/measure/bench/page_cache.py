"""Takes files out of the page cache, so that a memory cap means something."""

import os
from collections.abc import Iterable
from pathlib import Path


def drop_from_page_cache(paths: Iterable[Path]) -> None:
    """Drop `paths`, folders with all files in them; what a process has mapped stays."""
    for path in paths:
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        for file in files:
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)  # pages not yet written cannot be dropped
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
