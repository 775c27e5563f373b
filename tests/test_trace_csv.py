"""Routing in CSV becomes the trace that its columns say, and bad lines are named by number."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.errors import TraceError
from moe_runtime.trace import Phase, Trace
from moe_runtime.trace_csv import read_csv_trace
from tests.test_trace import example

HEADER = "sequence_id,position,layer,expert_0,expert_1"


def write(file: Path, *lines: str) -> Path:
    file.write_text("\n".join(lines) + "\n")
    return file


def as_lines(trace: Trace) -> list[str]:
    """Every column of a trace without padding."""
    ranks = range(trace.top_k)
    names = [f"expert_{rank}" for rank in ranks] + [f"weight_{rank}" for rank in ranks]
    lines = [f"{HEADER[:26]},{','.join(names)},step,phase,token_id,domain"]
    assert trace.weights is not None
    assert trace.token_id is not None
    assert trace.domain is not None
    for n in range(trace.num_tokens):
        for layer, layer_id in enumerate(trace.layer_ids):
            ids = [str(e) if e >= 0 else "" for e in trace.topk[n, layer]]
            weights = [repr(float(w)) for w in trace.weights[n, layer]]
            about = [
                trace.step[n],
                Phase(trace.phase[n]).name.lower(),
                trace.token_id[n],
                trace.domain[n],
            ]
            row = [trace.sequence_id[n], trace.position[n], layer_id, *ids, *weights, *about]
            lines.append(",".join(str(cell) for cell in row))
    return lines


@given(seed=st.integers(0, 100), shuffle=st.integers(0, 100))
def test_a_trace_survives_csv_in_any_order(
    seed: int, shuffle: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Law: all that CSV can hold comes back, however its lines are ordered."""
    fields = example(num_tokens=12, seed=seed)
    fields |= {"step": np.arange(12), "token_id": np.abs(fields["token_id"])}
    whole = Trace.of(fields)
    trace = whole.select(whole.phase != Phase.PADDING)
    header, *lines = as_lines(trace)
    np.random.default_rng(shuffle).shuffle(lines)
    file = write(tmp_path_factory.mktemp("csv") / "t.csv", header, *lines)
    found = read_csv_trace(file, num_experts=8)
    for name in ("topk", "weights", "token_id", "sequence_id", "position", "phase", "step"):
        np.testing.assert_array_equal(getattr(found, name), getattr(trace, name), err_msg=name)
    assert found.domain is not None
    np.testing.assert_array_equal(found.domain, trace.domain)
    assert found.layer_ids == trace.layer_ids


def test_the_least_csv_is_a_trace(tmp_path: Path) -> None:
    """Law: without optional columns the rules of a trace fill them in; absent rows are missing."""
    found = read_csv_trace(
        write(tmp_path / "t.csv", HEADER, "0,0,3,1,2", "0,0,5,0,", "", "0,1,5,7,6")
    )
    assert found.layer_ids == (3, 5)
    np.testing.assert_array_equal(found.topk, [[[1, 2], [0, -1]], [[-1, -1], [7, 6]]])
    assert found.weights is None
    assert found.num_experts == 8
    assert found.num_steps == 2


ROW = "0,0,0,1,2"
BAD = {
    "has no rows": [HEADER],
    "its first line lacks sequence_id; columns are sequence_id, position": [""],
    "its first line lacks expert_0": ["sequence_id,position,layer"],
    "column 'expert_2' is unknown": ["sequence_id,position,layer,expert_0,expert_2", ROW],
    "column 'layers' is unknown": [HEADER + ",layers", ROW + ",1"],
    "names a column twice": [HEADER + ",layer", ROW + ",1"],
    "2 expert columns and no weight_1": [HEADER + ",weight_0", ROW + ",0.5"],
    "line 3: has 4 cells, and the header 5": [HEADER, ROW, "0,0,1,1"],
    "line 2: expert_1 is 'x'; it must be an integer": [HEADER, "0,0,0,1,x"],
    "line 2: layer is '-1'; it must be an integer from 0": [HEADER, "0,0,-1,1,2"],
    "line 3: position is '1.0'": [HEADER, ROW, "0,1.0,0,1,2"],
    "line 3: layer 0 of this token is in line 2 already": [HEADER, ROW, ROW],
    "line 2: weight_0 is ''; it must be a number": [
        HEADER + ",weight_0,weight_1",
        ROW + ",,1",
    ],
    "line 2: phase is 'padding'; it must be prefill or decode": [
        HEADER + ",phase",
        ROW + ",padding",
    ],
    "line 3: differs from line 2 in phase, and both are position 0 of sequence 0": [
        HEADER + ",phase",
        ROW + ",decode",
        "0,0,1,1,2,prefill",
    ],
    "topk.0, 0. holds expert 1 twice": [HEADER, "0,0,0,1,1"],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_lines_are_named(message: str, tmp_path: Path) -> None:
    """Law: one line says which file, which line, what stands there and what should."""
    file = write(tmp_path / "t.csv", *BAD[message])
    with pytest.raises(TraceError, match=message) as caught:
        read_csv_trace(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_text_are_named(tmp_path: Path) -> None:
    """Law: absent and binary files are refused in words."""
    with pytest.raises(TraceError, match="cannot be read: No such file"):
        read_csv_trace(tmp_path / "absent.csv")
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TraceError, match="is not UTF-8 text"):
        read_csv_trace(tmp_path / "t.csv")
    (tmp_path / "t.csv").write_bytes(HEADER.encode() + b"\n\x00,0,0,1,2\n")
    with pytest.raises(TraceError, match=r"line 2|is not CSV"):
        read_csv_trace(tmp_path / "t.csv")
