"""The results of a batch: nothing finished is lost or run again, and nothing foreign is harmed."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.errors import BatchError
from moe_runtime.offline.request import BadLine, Request
from moe_runtime.offline.result_file import ResultFile, failure, success


def request(custom_id: str, line: int = 1) -> Request:
    return Request(
        line=line,
        custom_id=custom_id,
        prompt="x",
        messages=(),
        max_tokens=1,
        temperature=0.0,
        top_p=None,
        seed=None,
        stop=(),
    )


def result(custom_id: str) -> dict[str, object]:
    return success(
        request(custom_id),
        model="m",
        text="snö \ud800 \n",
        finish_reason="stop",
        num_prompt_tokens=3,
        num_new_tokens=4,
    )


BAD = BadLine(line=7, custom_id=None, code="invalid_json", message="not JSON")


def test_a_result_has_openais_fields() -> None:
    found = result("a")
    assert found["error"] is None
    assert found["custom_id"] == "a"
    answer = found["response"]["body"]
    assert answer["choices"] == [{"index": 0, "finish_reason": "stop", "text": "snö \ud800 \n"}]
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}


@given(cut=st.integers(0, 2000), names=st.lists(st.text(min_size=1), unique=True, max_size=4))
def test_a_file_cut_anywhere_keeps_its_whole_lines(
    tmp_path: Path, cut: int, names: list[str]
) -> None:
    """Law: after a crash at any byte, whole lines are finished, and the rest can be run again."""
    path = tmp_path / "results.jsonl"
    path.unlink(missing_ok=True)
    with ResultFile(path) as results:
        for name in names:
            results.append(result(name))
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    kept = whole[:cut].count(b"\n")
    with ResultFile(path) as results:
        assert results.finished == set(names[:kept])
        for name in names[kept:]:
            assert not results.is_done(request(name))
            results.append(result(name))
    assert path.read_bytes() == whole


def test_a_bad_line_is_reported_once_and_may_be_mended(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with ResultFile(path) as results:
        assert not results.is_reported(BAD)
        results.append(failure(BAD))
    with ResultFile(path) as results:
        assert results.is_reported(BAD)
        assert not results.finished


@pytest.mark.parametrize(
    "content", [b"hello\n", b"hello", b'{"custom_id": 5}\n{}\n', b"[1]\n", b"\x00" * 50]
)
def test_a_file_that_holds_something_else_is_left_alone(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_bytes(content)
    with pytest.raises(BatchError, match=r"line 1 of results file .* name another"):
        ResultFile(path)
    assert path.read_bytes() == content


def test_damage_before_the_end_is_not_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with ResultFile(path) as results:
        results.append(result("a"))
    damaged = path.read_bytes() + b"damage\n" + path.read_bytes()
    path.write_bytes(damaged)
    with pytest.raises(BatchError, match="line 2 of"):
        ResultFile(path)
    assert path.read_bytes() == damaged


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with ResultFile(path), pytest.raises(BatchError, match="being written by another run"):
        ResultFile(path)
    ResultFile(path).close()


@contextmanager
def full_disk(num_bytes: int) -> Iterator[None]:
    """Files of this process grow to `num_bytes` and no further."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_stops_the_run_and_keeps_whole_lines(tmp_path: Path) -> None:
    """Law: what was half written is taken back, and the same command goes on."""
    path = tmp_path / "results.jsonl"
    with ResultFile(path) as results:
        results.append(result("a"))
        whole = path.read_bytes()
        with (
            full_disk(len(whole) + 20),
            pytest.raises(BatchError, match=r"File too large; its \d+ bytes .* make room"),
        ):
            results.append(result("b"))
    assert path.read_bytes() == whole
    assert json.loads(whole)["custom_id"] == "a"
    with ResultFile(path) as results:
        assert results.finished == {"a"}
        results.append(result("b"))


def test_a_folder_or_a_device_is_no_results_file(tmp_path: Path) -> None:
    with pytest.raises(BatchError, match="not a regular file"):
        ResultFile(Path("/dev/full"))
    with pytest.raises(BatchError, match="cannot be opened: Is a directory"):
        ResultFile(tmp_path)
