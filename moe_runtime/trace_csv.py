"""Routing in a CSV file, one row for each token and layer, read as a trace."""

import csv
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_runtime.errors import TraceError
from moe_runtime.trace import Phase, Trace
from moe_runtime.trace_fields import Array

_KEY = ("sequence_id", "position", "layer")
_OPTIONAL = ("step", "phase", "token_id", "domain")
_PHASES = {phase.name.lower(): int(phase) for phase in (Phase.PREFILL, Phase.DECODE)}
_COLUMNS = f"{', '.join(_KEY)}, expert_0, ...; perhaps weight_0, ..., {', '.join(_OPTIONAL)}"


def read_csv_trace(path: Path, *, num_experts: int | None = None) -> Trace:
    """The trace of `path`; raises TraceError with the number of the line.

    Rows may come in any order. Those of a token agree in sequence_id, position and, where it is
    there, step; tokens are ordered by step, else as they first appear. The layers found become
    `layer_ids`. An empty expert cell, or a token without a row for a layer, is missing.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return _read(path, csv.reader(file), num_experts)
    except OSError as error:
        raise TraceError(f"trace {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise TraceError(f"trace {path} is not UTF-8 text; save it as UTF-8") from None
    except csv.Error as error:
        raise TraceError(f"trace {path} is not CSV ({error}); separate cells by commas") from error


@dataclass(slots=True)
class _Token:
    """What all rows of a token agree on, and the line that said it first."""

    line: int
    about: tuple[str, ...]  # values of _OPTIONAL as written


def _read(path: Path, rows: Iterator[list[str]], num_experts: int | None) -> Trace:
    columns = _header(path, next(rows, []))
    ranks = sum(name.startswith("expert_") for name in columns)
    has_weights = "weight_0" in columns
    tokens: dict[tuple[str, ...], _Token] = {}
    cells: dict[tuple[int, int], int] = {}  # token and layer -> line
    numbers: dict[tuple[str, ...], int] = {}
    ids: list[list[int]] = []
    weights: list[list[float]] = []
    for line, row in enumerate(rows, start=2):
        if not row:
            continue
        if len(row) != len(columns):
            raise TraceError(
                f"{path}, line {line}: has {len(row)} cells, and the header {len(columns)}"
            )
        cell = {name: row[column].strip() for name, column in columns.items()}
        key = tuple(cell[name] for name in (*_KEY[:2], "step") if name in cell)
        token = _Token(line, tuple(cell.get(name, "") for name in _OPTIONAL))
        first = tokens.setdefault(key, token)
        if first.about != token.about:
            raise TraceError(
                f"{path}, line {line}: differs from line {first.line} in "
                f"{_difference(first, token)}, and both are position {cell['position']} of "
                f"sequence {cell['sequence_id']}; rows of one token must agree"
            )
        place = (numbers.setdefault(key, len(numbers)), _integer(path, line, "layer", cell))
        if place in cells:
            raise TraceError(
                f"{path}, line {line}: layer {place[1]} of this token is in line {cells[place]} "
                "already; give each token one row a layer, or tell tokens apart by step"
            )
        cells[place] = line
        ids.append([_expert(path, line, f"expert_{rank}", cell) for rank in range(ranks)])
        if has_weights:
            weights.append([_weight(path, line, rank, cell) for rank in range(ranks)])
    if not cells:
        raise TraceError(f"trace {path} has no rows; a trace needs at least one token")
    fields = _fields(path, columns, tokens, cells, np.array(ids), weights)
    return Trace.of(fields, source=f"trace {path}", num_experts=num_experts)


def _header(path: Path, header: list[str]) -> dict[str, int]:
    columns = {name.strip(): column for column, name in enumerate(header)}
    for name in (*_KEY, "expert_0"):
        if name not in columns:
            raise TraceError(f"trace {path}: its first line lacks {name}; columns are {_COLUMNS}")
    ranks = sum(name.startswith("expert_") for name in columns)
    expected = {*_KEY, *_OPTIONAL} | {f"expert_{rank}" for rank in range(ranks)}
    if any(name.startswith("weight_") for name in columns):
        needed = [f"weight_{rank}" for rank in range(ranks)]
        expected |= set(needed)
        for name in needed:
            if name not in columns:
                raise TraceError(f"trace {path}: it has {ranks} expert columns and no {name}")
    for name in columns:
        if name not in expected:
            raise TraceError(f"trace {path}: column {name!r} is unknown; columns are {_COLUMNS}")
    if len(columns) != len(header):
        raise TraceError(f"trace {path}: its first line names a column twice")
    return columns


def _fields(
    path: Path,
    columns: Mapping[str, int],
    tokens: Mapping[tuple[str, ...], _Token],
    cells: Mapping[tuple[int, int], int],
    ids: Array,
    weights: list[list[float]],
) -> dict[str, object]:
    """Arrays as a trace wants them, from rows as they came."""
    token, layer = np.array(list(cells)).T
    layer_ids, layer = np.unique(layer, return_inverse=True)
    shape = (len(tokens), len(layer_ids), ids.shape[1])
    topk = np.full(shape, -1, np.int64)
    topk[token, layer] = ids
    fields: dict[str, object] = {"topk": topk, "layer_ids": layer_ids}
    if weights:
        weighed = np.zeros(shape, np.float64)
        weighed[token, layer] = np.array(weights)
        fields["weights"] = weighed
    written = [
        dict(zip(_OPTIONAL, entry.about, strict=True))
        | {"sequence_id": key[0], "position": key[1], "line": str(entry.line)}
        for key, entry in tokens.items()
    ]
    for name in ("sequence_id", "position", "step", "token_id"):
        if name in columns:
            fields[name] = np.array([_integer(path, e["line"], name, e) for e in written])
    if "phase" in columns:
        fields["phase"] = np.array([_phase(path, entry) for entry in written])
    if "domain" in columns:
        fields["domain"] = np.array([entry["domain"] for entry in written], np.str_)
    order = np.argsort(np.asarray(fields.get("step", np.zeros(len(tokens)))), kind="stable")
    return {
        name: value[order] if name != "layer_ids" and isinstance(value, np.ndarray) else value
        for name, value in fields.items()
    }


def _difference(first: _Token, second: _Token) -> str:
    pairs = zip(_OPTIONAL, first.about, second.about, strict=True)
    return next(name for name, ours, theirs in pairs if ours != theirs)


def _integer(path: Path, line: int | str, name: str, cell: Mapping[str, str]) -> int:
    if not re.fullmatch(r"\d{1,18}", cell[name]):
        raise TraceError(
            f"{path}, line {line}: {name} is {cell[name]!r}; it must be an integer from 0"
        )
    return int(cell[name])


def _expert(path: Path, line: int, name: str, cell: Mapping[str, str]) -> int:
    return -1 if cell[name] in ("", "-1") else _integer(path, line, name, cell)


def _weight(path: Path, line: int, rank: int, cell: Mapping[str, str]) -> float:
    written = cell[f"weight_{rank}"]
    if not written and cell[f"expert_{rank}"] in ("", "-1"):
        return 0.0
    try:
        return float(written)
    except ValueError:
        raise TraceError(
            f"{path}, line {line}: weight_{rank} is {written!r}; it must be a number"
        ) from None


def _phase(path: Path, cell: Mapping[str, str]) -> int:
    if cell["phase"] not in _PHASES:
        raise TraceError(
            f"{path}, line {cell['line']}: phase is {cell['phase']!r}; it must be "
            f"{' or '.join(_PHASES)}"
        )
    return _PHASES[cell["phase"]]
