"""Refuses to start a file that the disk cannot hold."""

import shutil
from pathlib import Path

from moe_runtime.expert_memory import format_bytes


def check_disk_space(
    path: Path,
    needed_bytes: int,
    *,
    remedy: str = "ask for fewer layers or experts, or name a path on another disk",
) -> None:
    """Raise ValueError unless the disk of `path`, whose folder exists, has `needed_bytes` free."""
    free_bytes = shutil.disk_usage(path.parent).free
    if needed_bytes > free_bytes:
        raise ValueError(
            f"{path} needs {format_bytes(needed_bytes)} of disk and {format_bytes(free_bytes)} are "
            f"free; {remedy}"
        )
