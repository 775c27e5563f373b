"""ExFlow's traces and solutions (commit 2696131)."""

import csv
from pathlib import Path
from typing import Any

import numpy as np

from moe_runtime.config import write_whole
from moe_runtime.errors import PlacementError, TraceError
from moe_runtime.integrations.placement_hints import PlacementHints
from moe_runtime.placement_map import Placement
from moe_runtime.trace import Trace

Array = np.ndarray[Any, Any]

_HEADER = ["Expert", "Node"]


def write_placement(placement: Placement, path: Path) -> None:
    """A solution in CSV: expert l * E + e and the GPU it is on, which ExFlow calls its node."""
    gpus = placement.gpu_of().ravel()
    lines = "".join(f"{expert},{gpu}\n" for expert, gpu in enumerate(gpus))
    write_whole(path, f"{','.join(_HEADER)}\n{lines}")


def read_placement(path: Path, hints: PlacementHints) -> Placement:
    """A solution of ExFlow; it does not say how many experts a layer has."""
    if hints.num_experts is None:
        raise PlacementError(
            f"{path} numbers the experts of all layers in one go; give --num-experts, or --like"
        )
    gpu_of = _gpu_of(path)
    if not len(gpu_of):
        raise PlacementError(f"{path} holds no experts; it is no solution of ExFlow")
    if len(gpu_of) % hints.num_experts:
        raise PlacementError(
            f"{path} has {len(gpu_of)} experts, which are no whole layers of {hints.num_experts}; "
            "give the true --num-experts"
        )
    table = gpu_of.reshape(-1, hints.num_experts)
    gpus = hints.gpus or int(table.max()) + 1
    counts = np.stack([(table == gpu).sum(axis=1) for gpu in range(gpus)], axis=1)
    if table.max() >= gpus or (counts != counts[0, 0]).any():
        raise PlacementError(
            f"{path} gives its GPUs {counts.min()} to {counts.max()} experts in a layer; every GPU "
            f"of {gpus} must have equally many, solve with load balance as a hard limit"
        )
    slots = np.argsort(table, axis=1, kind="stable")
    return hints.placement(slots, source=str(path), format_name="exflow", gpus=gpus)


def read_trace(path: Path, *, num_experts: int | None = None) -> Trace:
    """The one expert a layer that ExFlow keeps of every token, `[tokens, layers]` in an .npy."""
    try:
        found = np.load(path, allow_pickle=False)
    except OSError as error:
        raise TraceError(
            f"{path} cannot be read: {error.strerror or error}; check the path"
        ) from error
    except (ValueError, EOFError) as error:
        raise TraceError(f"{path} is no sound .npy ({error}); save it with numpy.save") from error
    if not isinstance(found, np.ndarray) or found.ndim != 2 or found.dtype.kind not in "iu":
        what = (
            f"{found.dtype} of shape {list(found.shape)}" if hasattr(found, "dtype") else "an .npz"
        )
        raise TraceError(f"{path} is {what}; a trace of ExFlow is whole numbers, [tokens, layers]")
    return Trace.of({"topk": found[..., None]}, source=str(path), num_experts=num_experts)


def _gpu_of(path: Path) -> Array:
    """`[L * E]` GPUs, by expert."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.reader(file))
    except OSError as error:
        raise PlacementError(f"{path} cannot be read: {error.strerror}; check the path") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise PlacementError(f"{path} is not CSV ({error}); save it again") from error
    if not rows or [cell.strip() for cell in rows[0]] != _HEADER:
        raise PlacementError(
            f"{path} does not start with {','.join(_HEADER)}; it is none of ExFlow's"
        )
    gpu_of = np.full(len(rows) - 1, -1, np.int64)
    for line, row in enumerate(rows[1:], start=2):
        try:
            expert, gpu = (int(float(cell)) for cell in row)
        except (ValueError, OverflowError):
            raise PlacementError(
                f"{path}, line {line}: {row} are not an expert and a GPU"
            ) from None
        if not 0 <= expert < len(gpu_of) or gpu < 0 or gpu_of[expert] >= 0:
            raise PlacementError(
                f"{path}, line {line}: expert {expert} on GPU {gpu}; experts 0 to "
                f"{len(gpu_of) - 1} must come once each, on GPUs from 0"
            )
        gpu_of[expert] = gpu
    return gpu_of
