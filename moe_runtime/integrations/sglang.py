"""SGLang's expert locations and its recordings of routing (0.5.23).

L decoder layers, dense ones included; S slots (SGLang: physical experts); K experts a token.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_runtime.config import write_whole
from moe_runtime.errors import PlacementError, TraceError
from moe_runtime.integrations.placement_hints import PlacementHints
from moe_runtime.integrations.torch_file import load_torch_file, save_torch_file
from moe_runtime.placement_map import Placement, integer_table, read_json
from moe_runtime.trace import Phase, Trace

Array = np.ndarray[Any, Any]

_KEY = "physical_to_logical_map"
_PER_TOKEN = "record with --expert-distribution-recorder-mode per_token"


def write_placement(placement: Placement, path: Path) -> None:
    """A file for --init-expert-location, JSON or torch by its ending.

    It holds one key and nothing else: SGLang passes the whole object on as keyword arguments, and
    fails on a second one. Rows are those of all decoder layers; a dense one, which is never looked
    at, still needs every expert, so it gets 0 to E - 1 in turn.
    """
    rows = np.tile(
        np.arange(placement.num_slots) % placement.num_experts, (placement.num_hidden_layers, 1)
    )
    rows[list(placement.layer_ids)] = placement.slots
    if path.suffix == ".pt":
        save_torch_file(path, {_KEY: rows.astype(np.int64)})
    elif path.suffix == ".json":
        lines = ",\n".join(f"    {row.tolist()}" for row in rows)
        write_whole(path, f'{{\n  "{_KEY}": [\n{lines}\n  ]\n}}\n')
    else:
        raise PlacementError(
            f"output {path}: SGLang tells formats by the ending; name it .json or .pt"
        )


def read_placement(path: Path, hints: PlacementHints) -> Placement:
    """A file that SGLang's --init-expert-location takes."""
    if path.suffix == ".pt":
        found = load_torch_file(path, PlacementError)
    else:
        found = read_json(path, "SGLang reads .json and .pt")
    if not isinstance(found, dict) or _KEY not in found:
        raise PlacementError(f"{path} has no {_KEY}; it is no expert location of SGLang")
    rows = found[_KEY]
    if hasattr(rows, "tolist"):
        rows = rows.tolist()
    slots = integer_table(rows, f"{path}: {_KEY}")
    ids = hints.layer_ids
    if ids is not None:
        if ids[-1] >= len(slots):
            raise PlacementError(
                f"{path} has {len(slots)} layers, and layer {ids[-1]} is asked for; it belongs to "
                "another model"
            )
        slots = slots[list(ids)]
    return hints.placement(slots, source=str(path), format_name="sglang")


def read_trace(path: Path, *, num_experts: int | None = None) -> Trace:
    """The tokens of one rank's per_token dump; ids of slots become ids of experts.

    A dump has no request ids. A chunk of a prompt that starts at position 0 starts a sequence; a
    row at position p goes on the sequence last seen at p - 1, in the order of the batch.
    """
    dump = load_torch_file(path, TraceError)
    expert_of_slot = _expert_of_slot(dump, path)
    sequences = _Sequences()
    blocks = [
        _tokens(record, expert_of_slot, sequences, f"{path}: records[{number}]")
        for number, record in _in_order(dump["records"])
    ]
    blocks = [block for block in blocks if len(block["token_id"])]
    if not blocks:
        raise TraceError(f"{path} holds no tokens; start the recording before requests are sent")
    fields = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    topk = fields["topk"]
    is_routed = (topk >= 0).any(axis=(0, 2))  # dense layers have nothing
    num_ranks = int(np.flatnonzero((topk >= 0).any(axis=(0, 1)))[-1]) + 1 if is_routed.any() else 0
    if not num_ranks:
        raise TraceError(f"{path}: no layer of it has experts; record again, and start it first")
    fields["topk"] = topk[:, is_routed, :num_ranks]
    facts = {
        "layer_ids": np.flatnonzero(is_routed),
        "num_hidden_layers": np.int64(topk.shape[1]),
        "num_experts": np.int64(expert_of_slot.max() + 1),
    }
    return Trace.of({**fields, **facts}, source=str(path), num_experts=num_experts)


def _expert_of_slot(dump: object, path: Path) -> Array:
    """`[L, S]` int64."""
    if isinstance(dump, dict) and "logical_count" in dump:
        raise TraceError(
            f"{path} holds counts of experts and no tokens, as mode stat writes; {_PER_TOKEN}, or "
            f"let SGLang balance by these counts alone: --init-expert-location {path}"
        )
    if not isinstance(dump, dict) or "records" not in dump:
        raise TraceError(f"{path} has no records; it is no dump of SGLang's recorder")
    records = dump["records"]
    if not records or any("topk_ids_of_layer" not in record for record in records):
        what = (
            "counts of experts and no tokens, as mode per_pass writes" if records else "no record"
        )
        raise TraceError(f"{path} holds {what}; {_PER_TOKEN}")
    found = dump.get("last_physical_to_logical_map")
    if found is None:
        raise TraceError(
            f"{path} lacks last_physical_to_logical_map, without which its slots have no experts; "
            "record with SGLang 0.5 or newer"
        )
    return np.asarray(found, np.int64)


def _in_order(records: Sequence[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    numbered = enumerate(records)
    return iter(sorted(numbered, key=lambda item: int(item[1]["forward_pass_id"])))


def _tokens(
    record: dict[str, Any], expert_of_slot: Array, sequences: "_Sequences", source: str
) -> dict[str, Array]:
    """Fields of a trace, a row a token of one forward."""
    slots = np.asarray(record["topk_ids_of_layer"], np.int64)  # [L, T, K]
    num_layers, num_tokens, num_ranks = slots.shape
    if num_layers != len(expert_of_slot) or num_tokens != len(record["input_ids"]):
        raise TraceError(
            f"{source} has {num_layers} layers and {num_tokens} tokens, the dump's map "
            f"{len(expert_of_slot)} layers and its input_ids {len(record['input_ids'])} tokens; "
            "the file contradicts itself, record again"
        )
    if slots.size and slots.max() >= expert_of_slot.shape[1]:
        raise TraceError(
            f"{source} holds slot {slots.max()}, and the map ends at "
            f"{expert_of_slot.shape[1] - 1}; record with --disable-shared-experts-fusion"
        )
    experts = np.take_along_axis(expert_of_slot, slots.reshape(num_layers, -1).clip(0), axis=1)
    experts = experts.reshape(slots.shape)
    is_missing = slots < 0
    if num_ranks > 1:  # a row of equal ids was never written
        is_missing |= (slots == slots[..., :1]).all(axis=-1, keepdims=True)
    experts[is_missing] = -1
    chunks = record.get("extend_seq_lens") or [1] * num_tokens
    if sum(chunks) > num_tokens:
        chunks = [1] * num_tokens
    num_tokens = sum(chunks)  # what follows filled up a batch of prompts, and is no text
    position = np.asarray(record["positions"], np.int64)[:num_tokens]
    starts = np.cumsum([0, *chunks[:-1]]) if num_tokens else np.zeros(0, np.int64)
    first = [int(position[start]) for start in starts]
    sequence = sequences.follow(first, chunks)
    is_prompt = np.repeat([n > 1 or p == 0 for n, p in zip(chunks, first, strict=True)], chunks)
    return {
        "topk": experts.transpose(1, 0, 2)[:num_tokens],
        "token_id": np.asarray(record["input_ids"], np.int64)[:num_tokens],
        "position": position,
        "sequence_id": np.repeat(np.asarray(sequence, np.int64), chunks),
        "phase": np.where(is_prompt, Phase.PREFILL, Phase.DECODE).astype(np.uint8),
        "step": np.full(num_tokens, int(record["forward_pass_id"]), np.int64),
    }


class _Sequences:
    """Tells which sequence goes on, by positions alone."""

    def __init__(self) -> None:
        self._count = 0
        self._waiting: dict[int, list[int]] = {}  # next position -> sequences, latest last

    def follow(self, starts: Sequence[int], lengths: Sequence[int]) -> list[int]:
        """A sequence for each chunk of a forward, given its first position and its length."""
        known: dict[int, list[int]] = {}
        for start, count in Counter(start for start in starts if start).items():
            waiting = self._waiting.get(start, [])
            # Those that waited longest have ended; the latest stand in the order of the batch.
            known[start] = waiting[-count:]
            del waiting[-count:]
        found = []
        for start in starts:
            if known.get(start):
                found.append(known[start].pop(0))
            else:
                found.append(self._count)
                self._count += 1
        for sequence, start, length in zip(found, starts, lengths, strict=True):
            self._waiting.setdefault(start + length, []).append(sequence)
        return found
