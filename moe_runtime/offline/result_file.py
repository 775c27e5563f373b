"""The file that a batch run writes its results to, line by line as they complete."""

import fcntl
import json
import os
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from moe_runtime.errors import BatchError
from moe_runtime.offline.request import BadLine, Request

SYNC_SECONDS = 1.0


class ResultFile:
    """Appends results; opened again, it knows what is finished and cuts a line torn by a crash.

    A line is one write, so a killed process leaves whole lines and at most one torn one behind. It
    is on the disk at most `SYNC_SECONDS` of appending later, and at close: what a power failure
    takes is run again. A file is one run's at a time. A context manager.

    Raises BatchError for a file that holds something else, is in use by another run, or cannot be
    opened; and from `append` when the disk is full, after cutting what was half written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.finished: set[str] = set()  # by custom_id
        self.reported: set[tuple[int, str]] = set()  # bad lines: line, message
        self._synced_at = time.monotonic()
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise BatchError(f"results file {path} cannot be opened: {error.strerror}") from error
        try:
            if not stat.S_ISREG(os.fstat(self._file).st_mode):
                raise BatchError(f"results file {path} is not a regular file; name another")
            self._lock()
            self._size_bytes = self._recover()
        except BaseException:
            os.close(self._file)
            raise

    def is_done(self, request: Request) -> bool:
        """Whether an earlier run answered it."""
        return request.custom_id in self.finished

    def is_reported(self, bad: BadLine) -> bool:
        """Whether an earlier run said so."""
        return (bad.line, bad.message) in self.reported

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line."""
        data = memoryview(json.dumps(record, allow_nan=False).encode() + b"\n")
        written = 0
        try:
            while written < len(data):
                written += os.write(self._file, data[written:])
            if time.monotonic() - self._synced_at >= SYNC_SECONDS:
                self._sync()
        except OSError as error:
            os.ftruncate(self._file, self._size_bytes)
            raise BatchError(
                f"results file {self._path} cannot be written: {error.strerror}; its "
                f"{self._size_bytes} bytes of finished lines are kept: make room, and run the same "
                "command again"
            ) from error
        self._size_bytes += len(data)

    def close(self) -> None:
        """Bring everything to the disk. Safe to call twice."""
        if self._file >= 0:
            file, self._file = self._file, -1
            try:
                os.fsync(file)
            finally:
                os.close(file)

    def __enter__(self) -> "ResultFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _sync(self) -> None:
        os.fsync(self._file)
        self._synced_at = time.monotonic()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BatchError(
                f"results file {self._path} is being written by another run; wait for it, or name "
                "another file"
            ) from None

    def _recover(self) -> int:
        """Learn from whole lines and cut what follows them; returns the bytes that stay."""
        whole_bytes = num_whole = 0
        with open(self._file, "rb", closefd=False) as reader:
            for raw in reader:
                record = _record(raw)
                if record is None:
                    break
                self._learn(record)
                whole_bytes += len(raw)
                num_whole += 1
            is_torn_only = not reader.read(1)
        size_bytes = os.fstat(self._file).st_size
        if whole_bytes < size_bytes:
            # Only the end of our own file can be torn: all else is not ours to cut.
            if not is_torn_only or (not num_whole and not _may_be_ours(self._path)):
                raise BatchError(
                    f"line {num_whole + 1} of results file {self._path} is not a result of a batch "
                    "run; name another file with -o"
                )
            os.ftruncate(self._file, whole_bytes)
        return whole_bytes

    def _learn(self, record: Mapping[str, Any]) -> None:
        if record["error"] is None:
            self.finished.add(record["custom_id"])
        else:
            self.reported.add((record["line"], record["error"]["message"]))


def _record(raw: bytes) -> Mapping[str, Any] | None:
    """One result, or None for anything else."""
    try:
        found = json.loads(raw)
        is_whole = raw.endswith(b"\n") and (
            isinstance(found["custom_id"], str)
            if found["error"] is None
            else isinstance(found["line"], int) and isinstance(found["error"]["message"], str)
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if is_whole else None


def _may_be_ours(path: Path) -> bool:
    """Whether a first line, torn, can be the beginning of a result."""
    beginning = b'{"custom_id": '
    with path.open("rb") as reader:
        found = reader.read(len(beginning))
    return beginning.startswith(found)


def success(
    request: Request,
    *,
    model: str,
    text: str,
    finish_reason: str,
    num_prompt_tokens: int,
    num_new_tokens: int,
) -> dict[str, Any]:
    """The result of a line that ran."""
    choice: dict[str, Any] = {"index": 0, "finish_reason": finish_reason}
    if request.is_chat:
        choice["message"] = {"role": "assistant", "content": text}
    else:
        choice["text"] = text
    usage = {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_new_tokens,
        "total_tokens": num_prompt_tokens + num_new_tokens,
    }
    body = {
        "object": "chat.completion" if request.is_chat else "text_completion",
        "model": model,
        "choices": [choice],
        "usage": usage,
    }
    return {
        "custom_id": request.custom_id,
        "line": request.line,
        "response": {"status_code": 200, "body": body},
        "error": None,
    }


def failure(bad: BadLine) -> dict[str, Any]:
    """The result of a line that cannot run."""
    return {
        "custom_id": bad.custom_id,
        "line": bad.line,
        "response": None,
        "error": {"code": bad.code, "message": bad.message},
    }
