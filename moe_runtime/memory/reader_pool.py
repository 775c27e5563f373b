"""A fixed set of threads that run jobs, in a way that no interrupt can jam."""

import atexit
import contextlib
import threading
import weakref
from collections.abc import Callable
from queue import Empty, SimpleQueue

Job = Callable[[], object]

# At the program's end, for the jobs under way.
_LAST_SECONDS = 10.0


class ReaderPool:
    """Jobs run in the order of `submit`, on `num_threads` threads.

    Not a ThreadPoolExecutor: a Ctrl-C inside the Python code of its semaphore can leave that locked
    for ever, and every thread behind it. Here the main thread touches one C-level queue only.
    """

    def __init__(self, num_threads: int, name: str) -> None:
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        # Also when the pool is forgotten, or the program ends.
        self._end = weakref.finalize(self, _end, self._jobs, num_threads)
        # Daemons, as a thread that never got to see its end must not keep the program from ending.
        self._threads = [
            threading.Thread(target=_work, args=(self._jobs,), name=f"{name}_{i}", daemon=True)
            for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()
        _open_pools.add(self)

    def submit(self, job: Job) -> None:
        """Run `job`, which must not raise, as soon as a thread is free."""
        self._jobs.put(job)

    def shutdown(self) -> None:
        """Finish the jobs handed over so far and end the threads. Safe to call twice."""
        self._end()
        for thread in self._threads:
            thread.join()


_open_pools: "weakref.WeakSet[ReaderPool]" = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """Wait for the jobs under way, and for no others, while Python is still there.

    A daemon that comes back from C++ into an interpreter that has gone aborts the whole program.
    """
    for pool in list(_open_pools):
        with contextlib.suppress(Empty):
            while True:
                pool._jobs.get_nowait()
        _end(pool._jobs, len(pool._threads))
        for thread in pool._threads:
            thread.join(_LAST_SECONDS)


def _end(jobs: "SimpleQueue[Job | None]", num_threads: int) -> None:
    for _ in range(num_threads):
        jobs.put(None)


def _work(jobs: "SimpleQueue[Job | None]") -> None:
    while True:
        job = jobs.get()
        if job is None:
            return
        job()
        del job  # or it, and what it refers to, would live until the next one
