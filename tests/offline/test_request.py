"""Lines of a batch file: what is understood, and what is refused with which words."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.errors import BatchError
from moe_runtime.offline.request import BadLine, Request, read_requests


def read(tmp_path: Path, *lines: object) -> tuple[list[Request], list[BadLine]]:
    file = tmp_path / "requests.jsonl"
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    file.write_bytes(b"\n".join(raw))
    return read_requests(file, max_tokens=16, temperature=0.0)


def body(**fields: object) -> dict[str, object]:
    return {"custom_id": "a", "body": {"prompt": "x"} | fields}


def refusal(tmp_path: Path, line: object) -> BadLine:
    good, bad = read(tmp_path, {"custom_id": "good", "body": {"prompt": "x"}}, line)
    assert [one.custom_id for one in good] == ["good"]  # the others run
    assert [one.line for one in bad] == [2]
    return bad[0]


def test_openai_lines_are_understood(tmp_path: Path) -> None:
    chat = {
        "custom_id": "b",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": "ignored",
            "messages": [{"role": "user", "content": "hi"}],
            "max_completion_tokens": 3,
            "temperature": 0.5,
            "top_p": 0.9,
            "seed": 7,
            "stop": ["\n", "END"],
            "stream": False,
        },
    }
    (first, second), bad = read(tmp_path, body(max_tokens=5, stop="."), b"", chat)
    assert not bad
    assert (first.line, second.line) == (1, 3)
    assert (first.prompt, first.max_tokens, first.stop, first.is_chat) == ("x", 5, (".",), False)
    assert (first.temperature, first.top_p, first.seed) == (0.0, None, None)
    assert second.is_chat
    assert second.messages == ({"role": "user", "content": "hi"},)
    assert (second.max_tokens, second.temperature, second.top_p) == (3, 0.5, 0.9)
    assert (second.seed, second.stop) == (7, ("\n", "END"))


def test_lines_that_do_not_say_have_the_runs_settings(tmp_path: Path) -> None:
    (one,), _ = read(tmp_path, body(max_tokens=None, temperature=None))
    assert (one.max_tokens, one.temperature) == (16, 0.0)


def test_a_byte_order_mark_and_windows_lines_do_not_matter(tmp_path: Path) -> None:
    line = json.dumps(body()).encode()
    good, bad = read(tmp_path, b"\xef\xbb\xbf" + line + b"\r", b"\r")
    assert len(good) == 1
    assert not bad


def test_token_ids_are_a_prompt(tmp_path: Path) -> None:
    (one,), _ = read(tmp_path, body(prompt=[5, 6]))
    assert one.prompt == (5, 6)


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        (b"{", "invalid_json", "not JSON"),
        (b"\xff\xfe", "invalid_json", "UTF-8"),
        (b"[1]", "invalid_json", "JSON list"),
        (b"[" * 100_000, "invalid_json", "not JSON"),
        ({"body": {"prompt": "x"}}, "invalid_request", "custom_id is None"),
        ({"custom_id": 7, "body": {"prompt": "x"}}, "invalid_request", "custom_id is 7"),
        ({"custom_id": "good", "body": {"prompt": "x"}}, "duplicate_custom_id", "on line 1"),
        ({"custom_id": "a"}, "invalid_request", '"body"'),
        (body(prompt=""), "empty_prompt", "empty"),
        (body(prompt=[]), "empty_prompt", "empty"),
        (body(prompt=None), "invalid_request", "prompt or messages"),
        (body(prompt=5), "invalid_request", "neither a text"),
        (body(prompt=[-1]), "invalid_request", "neither a text"),
        (body(prompt=[True]), "invalid_request", "neither a text"),
        (body(messages=[]), "invalid_request", "not both"),
        (body(prompt=None, messages=[]), "empty_prompt", "messages is empty"),
        (body(prompt=None, messages=[{"role": "user"}]), "invalid_request", "not a list of"),
        (body(max_tokens=0), "invalid_request", "max_tokens is 0"),
        (body(max_tokens=1.5), "invalid_request", "max_tokens is 1.5"),
        (body(max_tokens=True), "invalid_request", "max_tokens is True"),
        (body(temperature=-1), "invalid_request", "temperature is -1"),
        (body(temperature="hot"), "invalid_request", "temperature is 'hot'"),
        (
            b'{"custom_id": "a", "body": {"prompt": "x", "temperature": NaN}}',
            "invalid_request",
            "temperature is nan",
        ),
        (body(top_p=1.5), "invalid_request", "top_p is 1.5"),
        (body(top_p=0), "invalid_request", "above 0"),
        (body(seed=-1), "invalid_request", "seed is -1"),
        (body(stop=[""]), "invalid_request", "none of them empty"),
        (body(stop=["x"] * 17), "invalid_request", "at most 16"),
        (body(stop={"a": 1}), "invalid_request", "stop is"),
        (body(logit_bias={"1": 2}), "invalid_request", "'logit_bias', which is not supported"),
    ],
)
def test_a_bad_line_is_named_and_stops_no_other(
    line: object, code: str, words: str, tmp_path: Path
) -> None:
    bad = refusal(tmp_path, line)
    assert bad.code == code
    assert words in bad.message


@given(st.lists(st.binary(max_size=60).filter(lambda raw: b"\n" not in raw), min_size=1))
def test_no_bytes_make_it_stumble(tmp_path: Path, lines: list[bytes]) -> None:
    """Law: every line that is not blank is either a request or refused."""
    if not any(line.strip() for line in lines):
        return
    good, bad = read(tmp_path, *lines)
    assert len(good) + len(bad) == sum(bool(line.strip()) for line in lines)


def test_a_file_that_is_missing_or_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BatchError, match="holds no line"):
        read(tmp_path, b" ")
    with pytest.raises(BatchError, match="cannot be read: No such file"):
        read_requests(tmp_path / "none", max_tokens=1, temperature=0)
