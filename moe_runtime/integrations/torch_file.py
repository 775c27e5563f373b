"""Reads what torch.save wrote, tensors and plain values only, never code."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

from moe_runtime.errors import MoERuntimeError

# What torch.load raises on files that are damaged, or not torch's at all.
_DAMAGE = (RuntimeError, EOFError, ValueError, KeyError, AttributeError, zipfile.BadZipFile)


def load_torch_file(path: Path, error: type[MoERuntimeError]) -> Any:
    """What a `.pt` file holds, on the CPU; raises `error`, with the file's name."""
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror}; check the path") from problem
    except pickle.UnpicklingError as problem:
        raise error(
            f"{path} holds Python objects beyond tensors, lists and numbers, or is no file of "
            "torch.save; such objects could run code and are not read, save plain tensors"
        ) from problem
    except _DAMAGE as problem:
        reason = " ".join(str(problem).split())[:200] or type(problem).__name__
        raise error(
            f"{path} is no sound file of torch.save ({reason}); write it again"
        ) from problem


def save_torch_file(path: Path, found: dict[str, Any]) -> None:
    """Write arrays as int64 tensors, under the file's name only once it is whole."""
    import torch

    beside = path.with_name(f".{path.name}.part")
    try:
        torch.save({name: torch.from_numpy(array) for name, array in found.items()}, beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
