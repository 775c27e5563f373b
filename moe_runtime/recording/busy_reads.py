"""When a disk was busy, from reads that several threads make at a time."""

import threading
import time
from collections import deque

Busy = tuple[float, float, int]  # from when, to when, bytes read meanwhile


class BusyReads:
    """Stretches of time.perf_counter() in which at least one read is under way."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_under_way = 0
        self._began = 0.0
        self._num_bytes = 0
        self._over: deque[Busy] = deque()

    def begun(self) -> None:
        """A read begins."""
        with self._lock:
            if self._num_under_way == 0:
                self._began = time.perf_counter()
            self._num_under_way += 1

    def ended(self, num_bytes: int) -> None:
        """One that has begun is over, and asked for so many bytes."""
        with self._lock:
            self._num_under_way -= 1
            self._num_bytes += num_bytes
            if self._num_under_way == 0:
                self._close(time.perf_counter())

    def take(self) -> list[Busy]:
        """What was not taken yet. A stretch that goes on is cut here, and begins anew."""
        with self._lock:
            if self._num_under_way:
                now = time.perf_counter()
                self._close(now)
                self._began = now
            over = list(self._over)
            self._over.clear()
        return over

    def _close(self, now: float) -> None:
        self._over.append((self._began, now, self._num_bytes))
        self._num_bytes = 0
