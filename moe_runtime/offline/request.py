"""The lines of a batch file, in OpenAI's batch format."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_runtime.errors import BatchError

# Fields of a body that say nothing about what is generated.
_IGNORED = frozenset({"model", "user", "stream", "metadata", "store"})
_KNOWN = frozenset(
    {
        "prompt",
        "messages",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "seed",
        "stop",
    }
)
_MOST_STOPS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One line to run: a text, token ids or a conversation, and how to continue it.

    `line` counts from 1. `seed` None: drawn from the run's seed and `custom_id`.
    """

    line: int
    custom_id: str
    prompt: str | tuple[int, ...] | None  # None: `messages`
    messages: tuple[Mapping[str, str], ...]
    max_tokens: int
    temperature: float
    top_p: float | None
    seed: int | None
    stop: tuple[str, ...]

    @property
    def is_chat(self) -> bool:
        return self.prompt is None


@dataclass(frozen=True, slots=True, kw_only=True)
class BadLine:
    """A line that cannot run, and why; `custom_id` None where it has none that can be read."""

    line: int
    custom_id: str | None
    code: str
    message: str


def read_requests(
    file: Path, *, max_tokens: int, temperature: float
) -> tuple[list[Request], list[BadLine]]:
    """The lines of `file` that can run, and the others; blank lines are no lines.

    `max_tokens` and `temperature` hold for lines that do not say. Raises BatchError for a file that
    cannot be read or holds no line.
    """
    try:
        raw_lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise BatchError(f"requests file {file} cannot be read: {error.strerror}") from error
    requests: list[Request] = []
    bad: list[BadLine] = []
    seen: dict[str, int] = {}
    for line, raw in enumerate(raw_lines, start=1):
        if not raw.strip():
            continue
        custom_id = None
        try:
            entry = _entry(raw, is_first=line == 1)
            custom_id = _custom_id(entry)
            if custom_id in seen:
                raise _RefusedError(
                    "duplicate_custom_id",
                    f"custom_id {custom_id!r} was used on line {seen[custom_id]} already; give "
                    "each line its own",
                )
            seen[custom_id] = line
            requests.append(_request(line, custom_id, entry.get("body"), max_tokens, temperature))
        except _RefusedError as refusal:
            bad.append(
                BadLine(line=line, custom_id=custom_id, code=refusal.code, message=str(refusal))
            )
    if not requests and not bad:
        raise BatchError(
            f"requests file {file} holds no line; write one "
            '{"custom_id": "1", "body": {"prompt": "..."}} a line'
        )
    return requests, bad


class _RefusedError(Exception):
    """Why a line cannot run."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def _invalid(message: str) -> _RefusedError:
    return _RefusedError("invalid_request", message)


def _entry(raw: bytes, *, is_first: bool) -> dict[str, Any]:
    try:
        found = json.loads(raw.decode("utf-8-sig" if is_first else "utf-8"))
    except UnicodeDecodeError:
        raise _RefusedError(
            "invalid_json", "the line is not UTF-8 text; save it as UTF-8"
        ) from None
    except (ValueError, RecursionError) as error:
        raise _RefusedError("invalid_json", f"the line is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise _RefusedError(
            "invalid_json", f"the line is a JSON {type(found).__name__}; write an object"
        )
    return found


def _custom_id(entry: Mapping[str, Any]) -> str:
    found = entry.get("custom_id")
    if not isinstance(found, str) or not found:
        raise _invalid(
            f'custom_id is {found!r}; give each line a text of its own: "custom_id": "1"'
        )
    return found


def _request(
    line: int, custom_id: str, body: object, max_tokens: int, temperature: float
) -> Request:
    if not isinstance(body, dict):
        raise _invalid('the line has no object "body"; write {"prompt": "..."} there')
    # What is null is as good as absent.
    given = {name: value for name, value in body.items() if value is not None}
    unknown = sorted(set(given) - _KNOWN - _IGNORED)
    if unknown:
        raise _invalid(
            f"body has {unknown[0]!r}, which is not supported; leave it out (known: "
            f"{', '.join(sorted(_KNOWN))})"
        )
    prompt, messages = _prompt(given)
    for name in ("max_completion_tokens", "max_tokens"):
        max_tokens = _whole(given, name, max_tokens, least=1)
    top_p = _number(given, "top_p", 1.0, most=1.0)
    if top_p == 0:
        raise _invalid("top_p is 0; give a share of probability above 0")
    temperature = _number(given, "temperature", temperature)
    return Request(
        line=line,
        custom_id=custom_id,
        prompt=prompt,
        messages=messages,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p if top_p < 1 and temperature > 0 else None,
        seed=_whole(given, "seed", 0, least=0) if "seed" in given else None,
        stop=_stops(given.get("stop", ())),
    )


def _prompt(
    body: Mapping[str, Any],
) -> tuple[str | tuple[int, ...] | None, tuple[Mapping[str, str], ...]]:
    if ("prompt" in body) == ("messages" in body):
        raise _invalid("body needs a prompt or messages, and not both")
    if "prompt" in body:
        prompt = body["prompt"]
        is_ids = isinstance(prompt, list) and all(type(t) is int and t >= 0 for t in prompt)
        if not isinstance(prompt, str) and not is_ids:
            raise _invalid("prompt is neither a text nor a list of token ids")
        if not prompt:
            raise _RefusedError("empty_prompt", "the prompt is empty; write at least a word")
        return (prompt if isinstance(prompt, str) else tuple(prompt)), ()
    messages = body["messages"]
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise _invalid('messages is not a list of {"role": "...", "content": "..."} of texts')
    if not messages:
        raise _RefusedError("empty_prompt", "messages is empty; write at least one")
    return None, tuple({"role": one["role"], "content": one["content"]} for one in messages)


def _is_message(found: object) -> bool:
    return isinstance(found, dict) and all(
        isinstance(found.get(name), str) for name in ("role", "content")
    )


def _whole(body: Mapping[str, Any], name: str, default: int, *, least: int) -> int:
    found = body.get(name, default)
    if type(found) is not int or found < least or found >= 2**63:
        raise _invalid(f"{name} is {found!r}; give a whole number of at least {least}")
    return found


def _number(
    body: Mapping[str, Any], name: str, default: float, *, most: float = float("inf")
) -> float:
    found = body.get(name, default)
    # Written this way round, a NaN is refused too.
    if type(found) not in (int, float) or not 0 <= found <= most or found == float("inf"):
        limits = "of at least 0" if most == float("inf") else f"from 0 to {most:g}"
        raise _invalid(f"{name} is {found!r}; give a number {limits}")
    return float(found)


def _stops(found: object) -> tuple[str, ...]:
    stops: Sequence[object] = [found] if isinstance(found, str) else ()
    if isinstance(found, list | tuple):
        stops = found
    elif not isinstance(found, str):
        raise _invalid(f"stop is {found!r}; give a text or a list of texts")
    texts = tuple(stop for stop in stops if isinstance(stop, str) and stop)
    if len(texts) < len(stops) or len(texts) > _MOST_STOPS:
        raise _invalid(f"stop must hold at most {_MOST_STOPS} texts, none of them empty")
    return texts
