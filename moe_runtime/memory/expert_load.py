"""One expert on its way from disk into a slot."""

import threading


class ExpertLoad:
    """Done when all its reads are; carries the first error. Safe to wait on from any thread.

    It may stand in the books of its owner before `begin`: nothing waits for what never began.
    """

    __slots__ = ("_error", "_gate", "_has_begun", "_is_done", "_lock", "_remaining")

    def __init__(self) -> None:
        self._remaining = 0
        self._has_begun = False
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        # Held until done. Not an Event: an interrupt inside its Python code can leave it locked.
        self._gate = threading.Lock()
        self._is_done = False

    def begin(self, num_reads: int) -> None:
        """Expect `num_reads` calls of `finish_one`, and `close` after the last."""
        self._remaining = num_reads
        self._gate.acquire()
        self._has_begun = True

    def finish_one(self, error: BaseException | None = None) -> bool:
        """Count one read as over; True, once, if it was the last: the caller must then close."""
        with self._lock:
            self._remaining -= 1
            self._error = self._error or error
            return self._remaining == 0

    def fail(self, error: BaseException) -> None:
        """Record an error that happened after the reads."""
        self._error = self._error or error

    def close(self) -> None:
        """Wake the waiters; called once, after the last read and what follows it."""
        self._is_done = True
        self._gate.release()

    @property
    def has_begun(self) -> bool:
        return self._has_begun

    @property
    def is_done(self) -> bool:
        return self._is_done

    @property
    def has_arrived(self) -> bool:
        """Whether everything was read without an error."""
        return self._is_done and self._error is None

    @property
    def error(self) -> BaseException | None:
        return self._error

    def settle(self) -> None:
        """Block until done, whatever came of it."""
        if self._has_begun:
            with self._gate:  # sync: the reads of one expert
                pass

    def wait(self) -> None:
        """Block until done; raise what went wrong."""
        assert self._has_begun
        self.settle()
        if self._error is not None:
            raise self._error
