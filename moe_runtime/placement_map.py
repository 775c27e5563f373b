"""A placement: which expert every slot of every GPU holds, layer by layer.

L MoE layers, S slots a layer, E experts a layer, G GPUs.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from moe_runtime.config import write_whole
from moe_runtime.errors import PlacementError

Array = np.ndarray[Any, Any]

VERSION = 1
_KEYS = ("version", "model", "num_experts", "layer_ids", "num_hidden_layers", "gpus", "nodes")
_REMEDY = "make it again with `moe-runtime placement solve` or `placement import`"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Placement:
    """Slots in the order of ranks: GPU g has slots g * S/G to (g + 1) * S/G - 1, of every layer.

    GPUs are in the order of nodes in the same way. Row l is the l-th MoE layer, which stands at
    `layer_ids[l]` among all `num_hidden_layers`. `checkpoint` is the digest of the weights that it
    was made for, "" unknown. Every expert has at least one slot in each layer;
    with S = E exactly one. A GPU may hold an expert twice, as EPLB's maps do; our solvers never
    do that. Raises PlacementError if built from what cannot be.
    """

    model: str
    num_experts: int
    num_hidden_layers: int
    layer_ids: tuple[int, ...]
    gpus: int
    nodes: int
    slots: Array  # [L, S] int32 expert ids
    checkpoint: str = ""
    made: Mapping[str, object] = field(default_factory=dict)  # how: solver, options, figures

    def __post_init__(self) -> None:
        slots = np.asarray(self.slots)
        self._check(slots)
        slots = slots.astype(np.int32)  # a copy, as the caller's array may change
        slots.setflags(write=False)
        object.__setattr__(self, "slots", slots)

    @property
    def num_layers(self) -> int:
        return int(self.slots.shape[0])

    @property
    def num_slots(self) -> int:
        return int(self.slots.shape[1])

    @property
    def slots_per_gpu(self) -> int:
        return self.num_slots // self.gpus

    @property
    def is_replicated(self) -> bool:
        """Whether experts have more slots than one."""
        return self.num_slots > self.num_experts

    def by_gpu(self) -> Array:
        """`[L, G, S/G]` expert ids."""
        return self.slots.reshape(self.num_layers, self.gpus, self.slots_per_gpu)

    def hosts(self) -> Array:
        """`[L, G, E]` bool: whether a GPU holds an expert."""
        held = np.zeros((self.num_layers, self.gpus, self.num_experts), np.bool_)
        np.put_along_axis(held, self.by_gpu().astype(np.int64), True, axis=2)
        return held

    def gpu_of(self) -> Array:
        """`[L, E]` int32: the one GPU of each expert. Raises PlacementError if there are more."""
        if self.is_replicated:
            raise PlacementError(
                f"the placement has {self.num_slots} slots for {self.num_experts} experts, so an "
                "expert has no single GPU; use a placement without replicas"
            )
        gpu = np.empty((self.num_layers, self.num_experts), np.int32)
        owners = np.broadcast_to(np.arange(self.num_slots) // self.slots_per_gpu, self.slots.shape)
        np.put_along_axis(gpu, self.slots.astype(np.int64), owners.astype(np.int32), axis=1)
        return gpu

    def duplicate(self) -> tuple[int, int, int] | None:
        """The first (layer row, GPU, expert) that a GPU holds more than once, or None."""
        ordered = np.sort(self.by_gpu(), axis=2)
        found = np.argwhere(ordered[..., 1:] == ordered[..., :-1])
        if not found.size:
            return None
        layer, gpu, place = (int(i) for i in found[0])
        return layer, gpu, int(ordered[layer, gpu, place])

    @classmethod
    def load(cls, path: str | Path) -> "Placement":
        """From a placement.json; raises PlacementError."""
        return cls.from_json(read_json(Path(path), _REMEDY), source=f"placement {path}")

    @classmethod
    def from_json(cls, found: object, *, source: str) -> "Placement":
        """From what a placement.json holds; `source` is named in errors."""
        if not isinstance(found, dict) or "slots" not in found:
            raise PlacementError(f"{source} has no field slots, so it is no placement; {_REMEDY}")
        if found.get("version") != VERSION:
            raise PlacementError(
                f"{source} has version {found.get('version')!r}, and this program reads version "
                f"{VERSION}; {_REMEDY}"
            )
        missing = [name for name in _KEYS if name not in found]
        if missing:
            raise PlacementError(f"{source} lacks {', '.join(missing)}; {_REMEDY}")
        unknown = sorted(found.keys() - {*_KEYS, "checkpoint", "slots", "made"})
        if unknown:
            raise PlacementError(f"{source} has unknown fields {', '.join(unknown)}; {_REMEDY}")
        try:
            return cls(
                model=_typed(found, "model", str),
                num_experts=_typed(found, "num_experts", int),
                num_hidden_layers=_typed(found, "num_hidden_layers", int),
                layer_ids=tuple(_typed(found, "layer_ids", list)),
                gpus=_typed(found, "gpus", int),
                nodes=_typed(found, "nodes", int),
                slots=integer_table(found["slots"], "slots"),
                checkpoint=_typed(found, "checkpoint", str) if "checkpoint" in found else "",
                made=_typed(found, "made", dict) if "made" in found else {},
            )
        except PlacementError as error:
            raise PlacementError(f"{source}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write a placement.json under its name only once it is whole."""
        write_whole(Path(path), self.to_json())

    def to_json(self) -> str:
        """What a placement.json holds, a layer a line."""
        rows = ",\n".join(f"    {row.tolist()}" for row in self.slots)
        facts = {name: getattr(self, name) for name in _KEYS if name != "version"}
        facts = {"version": VERSION, **facts, "layer_ids": list(self.layer_ids)}
        facts |= {"checkpoint": self.checkpoint} if self.checkpoint else {}
        lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in facts.items()]
        made = json.dumps(dict(self.made), indent=2).replace("\n", "\n  ")
        lines += [f'  "slots": [\n{rows}\n  ]', f'  "made": {made}']
        return "{\n" + ",\n".join(lines) + "\n}\n"

    def _check(self, slots: Array) -> None:
        for name in ("num_experts", "gpus", "nodes"):
            if getattr(self, name) < 1:
                raise PlacementError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if slots.ndim != 2 or not slots.size or slots.dtype.kind not in "iu":
            raise PlacementError(
                f"slots is {slots.dtype} of shape {list(slots.shape)}; it must be expert ids, "
                "[layers, slots]"
            )
        num_layers, num_slots = slots.shape
        if num_slots % self.gpus:
            raise PlacementError(
                f"{num_slots} slots a layer do not divide among {self.gpus} GPUs; give every GPU "
                "equally many"
            )
        if self.gpus % self.nodes:
            raise PlacementError(
                f"{self.gpus} GPUs do not divide among {self.nodes} nodes; give every node equally "
                "many"
            )
        self._check_layers(num_layers)
        outside = np.argwhere((slots < 0) | (slots >= self.num_experts))
        if outside.size:
            layer, slot = (int(i) for i in outside[0])
            raise PlacementError(
                f"slots[{layer}][{slot}] is {slots[layer, slot]}; expert ids are 0 to "
                f"{self.num_experts - 1}"
            )
        is_there = np.zeros((num_layers, self.num_experts), np.bool_)
        np.put_along_axis(is_there, slots.astype(np.int64), True, axis=1)
        absent = np.argwhere(~is_there)
        if absent.size:
            layer, expert = (int(i) for i in absent[0])
            raise PlacementError(
                f"slots[{layer}] lacks expert {expert}, so its tokens have nowhere to go; every "
                f"layer must hold each of the {self.num_experts} experts"
            )

    def _check_layers(self, num_layers: int) -> None:
        ids = self.layer_ids
        if len(ids) != num_layers or not all(type(i) is int for i in ids):
            raise PlacementError(
                f"layer_ids has {len(ids)} entries and slots {num_layers} layers; they must be one "
                "whole number for each layer"
            )
        if ids[0] < 0 or any(b <= a for a, b in pairwise(ids)):
            raise PlacementError(f"layer_ids {list(ids)} must ascend from 0 or more")
        if self.num_hidden_layers <= ids[-1]:
            raise PlacementError(
                f"num_hidden_layers is {self.num_hidden_layers}, and layer_ids goes up to "
                f"{ids[-1]}; it must be at least {ids[-1] + 1}"
            )


def integer_table(found: object, name: str) -> Array:
    """Lists of whole numbers, equally long, as an array; raises PlacementError with the place."""
    if not isinstance(found, list) or not all(isinstance(row, list) for row in found):
        raise PlacementError(f"{name} must be a list of lists of whole numbers")
    if not found or not found[0]:
        raise PlacementError(f"{name} is empty; a placement has at least a layer and a slot")
    for number, row in enumerate(found):
        if len(row) != len(found[0]):
            raise PlacementError(
                f"{name}[{number}] has {len(row)} entries, and {name}[0] has {len(found[0])}; all "
                "must be equally long"
            )
        for place, value in enumerate(row):
            if type(value) is not int or not -(2**31) <= value < 2**31:
                raise PlacementError(f"{name}[{number}][{place}] is {value!r}, not an expert id")
    return np.array(found, np.int64)


def read_json(path: Path, remedy: str) -> Any:
    """What a JSON file holds; raises PlacementError, which ends with `remedy`."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlacementError(f"{path} cannot be read: {error.strerror}; check the path") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise PlacementError(f"{path} is not JSON ({error}); {remedy}") from error


def _typed(found: Mapping[str, Any], name: str, kind: type) -> Any:
    value = found[name]
    if type(value) is not kind:
        words = {int: "a whole number", str: "text", list: "a list", dict: "an object"}
        raise PlacementError(f"{name} is {value!r:.40}; it must be {words[kind]}")
    return value
