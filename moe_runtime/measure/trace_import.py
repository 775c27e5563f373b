"""Routing that others wrote, turned into one trace."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from moe_runtime.errors import TraceError
from moe_runtime.integrations import exflow, megatron, sglang, tensorrt_llm, vllm
from moe_runtime.trace import Trace
from moe_runtime.trace_csv import read_csv_trace
from moe_runtime.trace_fields import Array
from moe_runtime.trace_writer import TraceWriter

# A reader takes a file and, as num_experts=, what the user knows of it or None.
READERS: dict[str, Callable[..., Trace]] = {
    "npz": Trace.load,
    "csv": read_csv_trace,
    "sglang": sglang.read_trace,
    "tensorrt-llm": tensorrt_llm.read_trace,
    "megatron": megatron.read_trace,
    "vllm": vllm.read_trace,
    "exflow": exflow.read_trace,
}
# Their files are one a rank: ranks that saw the same tokens must not count them twice.
_ONE_FILE_A_RANK = frozenset({"sglang", "tensorrt-llm", "megatron"})
_ROWS_THAT_TELL = 100  # so many rows with ascending ids are no accident


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportResult:
    """What went into a trace. Sequences of different files are different sequences."""

    num_files: int
    num_tokens: int
    num_sequences: int
    # Whether ids ascend in every row: then the first is not the expert of the largest weight.
    is_sorted_by_id: bool


def import_traces(
    files: Sequence[Path],
    output: Path,
    *,
    source: str,
    num_experts: int | None = None,
    model: str | None = None,
    domain: str | None = None,
) -> ImportResult:
    """Write the rows of `files`, one file after the other, to `output`. Raises TraceError.

    `source` names the reader; `model` and `domain` replace what the files say. Sequence ids are
    numbered anew, in ascending order of the old ones.
    """
    read = READERS[source]
    num_sequences = 0
    seen: dict[bytes, Path] = {}
    is_sorted = True
    writer = TraceWriter(output)
    try:
        for file in files:
            trace = read(file, num_experts=num_experts)
            if model is not None:
                trace = replace(trace, model=model)
            if domain is not None:
                trace = replace(trace, domain=np.full(trace.num_tokens, domain))
            if source in _ONE_FILE_A_RANK:
                _check_new(seen, file, trace.topk)
            is_sorted = is_sorted and _ascends(trace.topk)
            ids, sequence = np.unique(trace.sequence_id, return_inverse=True)
            sequence = (sequence + num_sequences).astype(np.int32)
            num_sequences += len(ids)
            try:
                writer.append(replace(trace, sequence_id=sequence))
            except TraceError as error:
                raise TraceError(
                    f"{file} does not fit the files before it: {error}; where only num_experts "
                    "differs, give --num-experts"
                ) from error
    except BaseException:
        writer.discard()  # the files are still there
        raise
    writer.close()
    return ImportResult(
        num_files=len(files),
        num_tokens=writer.num_tokens,
        num_sequences=num_sequences,
        is_sorted_by_id=is_sorted and writer.num_tokens >= _ROWS_THAT_TELL,
    )


def _check_new(seen: dict[bytes, Path], file: Path, topk: Array) -> None:
    digest = hashlib.sha256(np.ascontiguousarray(topk).tobytes()).digest()
    first = seen.setdefault(digest, file)
    if first is not file:
        raise TraceError(
            f"{file} holds the same routing as {first}: ranks that share their tokens record each "
            "of them; import one of the two"
        )


def _ascends(topk: Array) -> bool:
    """Whether a row's ids are in ascending order throughout, as if read off a mask."""
    return topk.shape[-1] > 1 and bool((np.diff(topk.astype(np.int32), axis=-1) > 0).all())
