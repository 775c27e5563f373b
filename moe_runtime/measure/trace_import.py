"""Routing that others wrote, turned into one trace."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from moe_runtime.errors import TraceError
from moe_runtime.trace import Trace
from moe_runtime.trace_csv import read_csv_trace
from moe_runtime.trace_writer import TraceWriter

# A reader takes a file and, as num_experts=, what the user knows of it or None.
READERS: dict[str, Callable[..., Trace]] = {"npz": Trace.load, "csv": read_csv_trace}


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportResult:
    """What went into a trace. Sequences of different files are different sequences."""

    num_files: int
    num_tokens: int
    num_sequences: int


def import_traces(
    files: Sequence[Path], output: Path, *, source: str, num_experts: int | None = None
) -> ImportResult:
    """Write the rows of `files`, one file after the other, to `output`. Raises TraceError.

    `source` names the reader. Sequence ids are numbered anew, in ascending order of the old ones.
    """
    read = READERS[source]
    num_sequences = 0
    writer = TraceWriter(output)
    try:
        for file in files:
            trace = read(file, num_experts=num_experts)
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
        num_files=len(files), num_tokens=writer.num_tokens, num_sequences=num_sequences
    )
