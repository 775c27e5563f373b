"""One expert on its way from disk into a slot."""

import threading
import time
from collections.abc import Callable


class ExpertLoad:
    """Done when all its reads are; carries the first error. Safe to wait on from any thread.

    It may stand in the books of its owner before `begin`: nothing waits for what never began.
    """

    __slots__ = ("_done_at", "_error", "_gate", "_has_begun", "_is_done", "_lock", "_remaining")

    def __init__(self) -> None:
        self._remaining = 0
        self._has_begun = False
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        # Held until done. Not an Event: an interrupt inside its Python code can leave it locked.
        self._gate = threading.Lock()
        self._is_done = False
        self._done_at = 0.0

    def begin(self, num_reads: int) -> None:
        """Expect `num_reads` calls of `account`."""
        self._remaining = num_reads
        self._gate.acquire()
        self._has_begun = True

    def account(self, error: BaseException | None, on_complete: Callable[[], None] | None) -> None:
        """One read is over; after the last one, `on_complete` runs and waiters wake."""
        with self._lock:
            self._remaining -= 1
            self._error = self._error or error
            is_last = self._remaining == 0
        if not is_last:
            return
        if self._error is None and on_complete is not None:
            try:
                on_complete()
            except BaseException as caught:
                self._error = caught
        self._done_at = time.perf_counter()
        self._is_done = True
        self._gate.release()

    @property
    def has_begun(self) -> bool:
        return self._has_begun

    @property
    def is_done(self) -> bool:
        return self._is_done

    @property
    def done_at(self) -> float:
        """When it was done, by time.perf_counter(); 0 before."""
        return self._done_at

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
