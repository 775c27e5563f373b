"""One expert on its way from disk into a slot."""

import threading


class ExpertLoad:
    """Done when all its reads are; carries the first error. Safe to wait on from any thread."""

    __slots__ = ("_done", "_error", "_lock", "_remaining")

    def __init__(self, num_reads: int) -> None:
        self._remaining = num_reads
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._done = threading.Event()

    def finish_one(self, error: BaseException | None = None) -> bool:
        """Count one read as over; True if it was the last and none failed."""
        with self._lock:
            self._remaining -= 1
            self._error = self._error or error
            return self._remaining == 0 and self._error is None

    def close(self) -> None:
        """Wake the waiters; called once, after the last read and what follows it."""
        self._done.set()

    def fail(self, error: BaseException) -> None:
        """Record an error that happened after the reads."""
        self._error = self._error or error

    @property
    def remaining(self) -> int:
        return self._remaining

    @property
    def is_done(self) -> bool:
        return self._done.is_set()

    @property
    def error(self) -> BaseException | None:
        return self._error

    def settle(self) -> None:
        """Block until done, whatever came of it."""
        self._done.wait()

    def wait(self) -> None:
        """Block until done; raise what went wrong."""
        self._done.wait()
        if self._error is not None:
            raise self._error
