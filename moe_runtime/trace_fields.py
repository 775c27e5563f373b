"""The fields of a routing trace: what each may hold, and what stands for a missing one.

N tokens, L MoE layers, K experts a token, E experts a layer, D model dim.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from typing import Any

import numpy as np

from moe_runtime.errors import TraceError

Array = np.ndarray[Any, Any]

# Experts a layer of the models people run, for traces that do not say; beyond, multiples of 512.
COMMON_NUM_EXPERTS = (8, 16, 32, 60, 64, 72, 96, 128, 160, 192, 256, 288, 384, 512)
_MAX_NUM_EXPERTS = 2**15  # ids are int16
_FLOAT16_MAX = 65504.0


class Phase(IntEnum):
    """What a row was to its forward."""

    PREFILL = 0  # one of several new tokens of its sequence
    DECODE = 1  # the one new token of its sequence
    PADDING = 2  # filled up a batch: no token of a text, and yet it used experts


@dataclass(frozen=True, slots=True)
class Field:
    """An array of a trace: the dtype it is kept in, its axes, and the least and greatest value."""

    dtype: str
    axes: str
    low: float = -np.inf
    high: float = np.inf


FIELDS = {
    "topk": Field("int16", "NLK", -1),
    "weights": Field("float16", "NLK", -_FLOAT16_MAX, _FLOAT16_MAX),
    "token_id": Field("int32", "N", -1, 2**31 - 1),
    "sequence_id": Field("int32", "N", 0, 2**31 - 1),
    "position": Field("int32", "N", -1, 2**31 - 1),
    "phase": Field("uint8", "N", min(Phase), max(Phase)),
    "step": Field("int64", "N", 0, 2**62),
    "domain": Field("str", "N"),
    "gate_probs": Field("float16", "NLE", 0, 1),
    "hidden": Field("float16", "NLD", -_FLOAT16_MAX, _FLOAT16_MAX),
}
SCALARS = ("num_experts", "num_hidden_layers", "layer_ids", "model", "checkpoint")


def complete_fields(
    found: Mapping[str, Any], *, source: str, num_experts: int | None = None
) -> dict[str, Any]:
    """Every field of a trace, checked, from those that were `found`; names without meaning go.

    Only `topk` must be there. `num_experts` overrides what `found` says. What is missing is
    inferred: one sequence; positions counted within each sequence; every row decoded; one token a
    step; as many experts as the next common size above the largest id; layers 0 to L - 1.
    `source` names the trace in errors.
    """
    if "topk" not in found:
        there = ", ".join(list(found)[:5]) or "nothing"
        raise TraceError(
            f"{source} has no field topk (it has {there}), so it is no routing trace; "
            "a trace needs at least topk [tokens, layers, experts a token]"
        )
    topk = _checked_topk(np.asarray(found["topk"]), source)
    num_tokens, num_layers, _ = topk.shape
    lengths = dict(zip("NLK", topk.shape, strict=True))
    lengths["E"] = _num_experts(found, topk, source, num_experts)
    fields: dict[str, Any] = dict.fromkeys(FIELDS) | {"topk": topk, "num_experts": lengths["E"]}
    for name, field in FIELDS.items():
        if name != "topk" and found.get(name) is not None:
            fields[name] = _checked(name, field, np.asarray(found[name]), lengths, topk, source)
    if fields["sequence_id"] is None:
        fields["sequence_id"] = np.zeros(num_tokens, np.int32)
    if fields["phase"] is None:
        fields["phase"] = np.full(num_tokens, Phase.DECODE, np.uint8)
    if fields["position"] is None:
        fields["position"] = _counted(fields["sequence_id"], fields["phase"])
    if fields["step"] is None:
        fields["step"] = np.arange(num_tokens, dtype=np.int64)
    _check_rows(fields, source)
    layer_ids = _layer_ids(found, num_layers, source)
    fields["layer_ids"] = layer_ids
    fields["num_hidden_layers"] = _num_hidden_layers(found, layer_ids, source)
    fields["model"] = str(_scalar(found, "model", "U", source) or "unknown")
    fields["checkpoint"] = str(_scalar(found, "checkpoint", "U", source) or "")
    return fields


def _checked_topk(topk: Array, source: str) -> Array:
    if topk.ndim != 3:
        raise TraceError(
            f"{source}: topk has shape {list(topk.shape)}; it must be "
            "[tokens, layers, experts a token]"
        )
    if topk.dtype.kind not in "iu":
        raise TraceError(f"{source}: topk is {topk.dtype}; expert ids must be integers")
    if not topk.size:
        raise TraceError(
            f"{source}: topk is empty, shape {list(topk.shape)}; a trace needs at least one token, "
            "layer and expert"
        )
    _check_range("topk", topk, -1, _MAX_NUM_EXPERTS - 1, source)
    topk = topk.astype(np.int16, copy=False)
    if topk.max() < 0:
        raise TraceError(f"{source}: every id of topk is -1, missing; record the trace again")
    ordered = np.sort(topk, axis=-1)
    is_double = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    if is_double.any():
        token, layer, rank = (int(i) for i in np.argwhere(is_double)[0])
        raise TraceError(
            f"{source}: topk[{token}, {layer}] holds expert {ordered[token, layer, rank]} twice; a "
            "token uses an expert once, write -1 where there is none"
        )
    return topk


def _num_experts(found: Mapping[str, Any], topk: Array, source: str, override: int | None) -> int:
    largest = int(topk.max())
    written = _scalar(found, "num_experts", "iu", source) if override is None else override
    if written is None:
        return next(
            (size for size in COMMON_NUM_EXPERTS if size > largest), (largest // 512 + 1) * 512
        )
    num_experts = int(written)
    if num_experts > _MAX_NUM_EXPERTS:
        raise TraceError(
            f"{source}: num_experts is {num_experts}; at most {_MAX_NUM_EXPERTS} fit the format"
        )
    if largest >= num_experts:
        where = ", ".join(str(i) for i in np.argwhere(topk == largest)[0])
        raise TraceError(
            f"{source}: topk[{where}] is {largest} and num_experts is {num_experts}, so ids end at "
            f"{num_experts - 1}; give the true num_experts, or record the trace again"
        )
    return num_experts


def _checked(
    name: str, field: Field, array: Array, lengths: dict[str, int], topk: Array, source: str
) -> Array:
    # D is whatever hidden has.
    expected = [lengths.get(axis, array.shape[-1] if array.ndim else 0) for axis in field.axes]
    if list(array.shape) != expected:
        raise TraceError(
            f"{source}: {name} has shape {list(array.shape)}, and topk with num_experts "
            f"{lengths['E']} asks for {expected}; both must come from the same recording"
        )
    if field.dtype == "str":
        if array.dtype.kind != "U":
            raise TraceError(f"{source}: {name} is {array.dtype}; it must be text, one a token")
        return array
    kinds = "f" if field.dtype == "float16" else "iu"
    if array.dtype.kind not in kinds:
        kind = "floating-point numbers" if kinds == "f" else "integers"
        raise TraceError(f"{source}: {name} is {array.dtype}; it must be {kind}")
    if name == "weights" and (is_missing := topk < 0).any():
        array = np.where(is_missing, array.dtype.type(0), array)
    _check_range(name, array, field.low, field.high, source)
    return array.astype(field.dtype, copy=False)


def _check_range(name: str, array: Array, low: float, high: float, source: str) -> None:
    least, most = array.min(), array.max()
    if low <= least and most <= high:  # False for NaN
        return
    where = np.argwhere(~((array >= low) & (array <= high)))[0]
    raise TraceError(
        f"{source}: {name}[{', '.join(str(i) for i in where)}] is {array[tuple(where)]}; it must "
        f"be from {low:.6g} to {high:.6g}; record the trace again"
    )


def _counted(sequence_id: Array, phase: Array) -> Array:
    """The how-manieth token of its sequence each row is; -1 for padding."""
    position = np.full(len(sequence_id), -1, np.int32)
    rows = np.flatnonzero(phase != Phase.PADDING)
    order = np.argsort(sequence_id[rows], kind="stable")
    ordered = sequence_id[rows][order]
    starts = np.flatnonzero(np.diff(ordered, prepend=-1))
    lengths = np.diff(starts, append=len(ordered))
    position[rows[order]] = np.arange(len(ordered)) - np.repeat(starts, lengths)
    return position


def _check_rows(fields: dict[str, Any], source: str) -> None:
    step, position = fields["step"], fields["position"]
    falls = np.flatnonzero(np.diff(step) < 0)
    if falls.size:
        row = int(falls[0]) + 1
        raise TraceError(
            f"{source}: step[{row}] is {step[row]} after {step[row - 1]}; steps must not decrease, "
            "sort the rows by step"
        )
    odd = np.flatnonzero((position < 0) != (fields["phase"] == Phase.PADDING))
    if odd.size:
        row = int(odd[0])
        name = Phase(int(fields["phase"][row])).name.lower()
        raise TraceError(
            f"{source}: position[{row}] is {position[row]} in a {name} row; padding rows, phase "
            f"{Phase.PADDING.value}, have position -1, and only they"
        )


def _layer_ids(found: Mapping[str, Any], num_layers: int, source: str) -> tuple[int, ...]:
    if found.get("layer_ids") is None:
        return tuple(range(num_layers))
    array = np.asarray(found["layer_ids"])
    if array.dtype.kind not in "iu" or array.shape != (num_layers,):
        raise TraceError(
            f"{source}: layer_ids is {array.dtype} of shape {list(array.shape)}; it must be one "
            f"integer for each of topk's {num_layers} layers"
        )
    ids = tuple(int(i) for i in array)
    if ids[0] < 0 or any(b <= a for a, b in pairwise(ids)):
        raise TraceError(
            f"{source}: layer_ids {list(ids)} must ascend from 0 or more, in the model's order"
        )
    return ids


def _num_hidden_layers(found: Mapping[str, Any], layer_ids: tuple[int, ...], source: str) -> int:
    written = _scalar(found, "num_hidden_layers", "iu", source)
    if written is None:
        return layer_ids[-1] + 1
    if int(written) <= layer_ids[-1]:
        raise TraceError(
            f"{source}: num_hidden_layers is {int(written)}, and layer_ids goes up to "
            f"{layer_ids[-1]}; it must be at least {layer_ids[-1] + 1}"
        )
    return int(written)


def _scalar(found: Mapping[str, Any], name: str, kinds: str, source: str) -> Any:
    """The one value of `name`, or None."""
    if found.get(name) is None:
        return None
    array = np.asarray(found[name])
    if array.ndim or array.dtype.kind not in kinds:
        kind = "text" if kinds == "U" else "integer"
        raise TraceError(
            f"{source}: {name} is {array.dtype} of shape {list(array.shape)}; it must be one {kind}"
        )
    return array.item()
