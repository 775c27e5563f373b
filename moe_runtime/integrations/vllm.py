"""vLLM's routed experts of requests, and lists of slots as its proposals read them (0.33.0)."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from moe_runtime.config import write_whole
from moe_runtime.errors import PlacementError, TraceError
from moe_runtime.integrations.placement_hints import PlacementHints
from moe_runtime.placement_map import Placement, integer_table, read_json
from moe_runtime.trace import Trace

Array = np.ndarray[Any, Any]


def write_placement(placement: Placement, path: Path) -> None:
    """A JSON list, a row of expert ids for each MoE layer, as pull request 49572 proposes.

    vLLM 0.33.0 itself loads no placement; nothing of it tells ranks apart but their order.
    """
    lines = ",\n".join(f"  {row.tolist()}" for row in placement.slots)
    write_whole(path, f"[\n{lines}\n]\n")


def read_placement(path: Path, hints: PlacementHints) -> Placement:
    """A list of rows, or one row that holds for every layer of `hints`."""
    found = read_json(path, "write a list of lists of expert ids")
    if isinstance(found, list) and found and not any(isinstance(row, list) for row in found):
        if hints.layer_ids is None:
            raise PlacementError(
                f"{path} is one row for all layers, and does not say how many; give --like"
            )
        found = [found] * len(hints.layer_ids)
    slots = integer_table(found, f"{path}: the list")
    return hints.placement(slots, source=str(path), format_name="vllm-list")


def read_trace(path: Path, *, num_experts: int | None = None) -> Trace:
    """Requests' `routed_experts` [tokens, layers, K]: one in an .npy, several in an .npz.

    Arrays of an .npz are a sequence each, in the order of their names. vLLM 0.33.0 has rows for
    dense layers too, zero throughout; as no token uses an expert twice, that tells them.
    """
    arrays = _arrays(path)
    shapes = {array.shape[1:] for array in arrays.values()}
    if len(shapes) > 1:
        raise TraceError(
            f"{path}: its arrays have layers and experts a token {sorted(shapes)}; one file holds "
            "requests of one model"
        )
    topk = np.concatenate(list(arrays.values()))
    is_dense = (topk == 0).all(axis=(0, 2))
    if is_dense.all():
        raise TraceError(
            f"{path} is zero throughout, so nothing was recorded; see docs/placement.md"
        )
    lengths = [len(array) for array in arrays.values()]
    fields = {
        "topk": topk[:, ~is_dense],
        "sequence_id": np.repeat(np.arange(len(lengths)), lengths),
        "layer_ids": np.flatnonzero(~is_dense),
        "num_hidden_layers": np.int64(topk.shape[1]),
    }
    return Trace.of(fields, source=str(path), num_experts=num_experts)


def _arrays(path: Path) -> dict[str, Array]:
    try:
        with np.load(path, allow_pickle=False) as found:
            if "topk" in found:
                raise TraceError(f"{path} is a trace of ours; import it --from npz")
            arrays = {name: found[name] for name in sorted(found)}
    except (AttributeError, TypeError):  # an .npy is an array and no context
        arrays = {path.stem: np.load(path, allow_pickle=False)}
    except OSError as error:
        raise TraceError(
            f"{path} cannot be read: {error.strerror or error}; check the path"
        ) from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())[:200]
        raise TraceError(f"{path} is no sound .npy or .npz ({reason}); save it again") from error
    for name, array in arrays.items():
        if array.ndim != 3 or array.dtype.kind not in "iu":
            raise TraceError(
                f"{path}: {name} is {array.dtype} of shape {list(array.shape)}; routed_experts are "
                "whole numbers, [tokens, layers, experts a token]"
            )
    return {name: array.astype(np.int64) for name, array in arrays.items() if len(array)}
