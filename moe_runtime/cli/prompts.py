"""Reads prompts from the command line, a file or standard input."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import typer


def read_prompts(prompts: Sequence[str], file: str | None) -> list[str]:
    """The prompts in order, from `prompts` or from `file`, of which exactly one must be given."""
    if prompts and file is not None:
        raise typer.BadParameter("give --prompt or --prompts, not both")
    if not prompts and file is None:
        raise typer.BadParameter("give --prompt TEXT, or --prompts FILE")
    if file is None:
        return list(prompts)
    return [prompt for prompt, _ in read_labelled_prompts(file)]


def read_labelled_prompts(file: str) -> list[tuple[str, str]]:
    """The prompts of `file` in order, each with its domain, "" if it has none.

    A file holds one prompt a line, blank lines left out; one called *.jsonl holds JSON objects with
    a "prompt" and perhaps a "domain"; `-` is standard input.
    """
    try:
        raw = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise ValueError(f"prompts file {file} cannot be read: {error.strerror}") from error
    try:
        lines = raw.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"prompts file {file} is not UTF-8 text; save it as UTF-8") from None
    if file.endswith(".jsonl"):
        found = [_prompt_of(file, number, line) for number, line in _numbered(lines)]
    else:
        found = [(line, "") for _, line in _numbered(lines)]
    if not found:
        raise ValueError(f"prompts file {file} holds no prompt; write one a line")
    return found


def _numbered(lines: list[str]) -> list[tuple[int, str]]:
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def _prompt_of(file: str, number: int, line: str) -> tuple[str, str]:
    try:
        entry = json.loads(line)
        prompt, domain = entry["prompt"], entry.get("domain", "")
    except (ValueError, KeyError, TypeError, AttributeError):
        prompt, domain = None, ""
    if not isinstance(prompt, str) or not isinstance(domain, str):
        raise ValueError(
            f'line {number} of {file} is not a JSON object with a text "prompt"; '
            'write {"prompt": "..."}'
        )
    return prompt, domain
