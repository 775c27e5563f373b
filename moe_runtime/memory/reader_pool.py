"""A fixed set of threads that run jobs, in a way that no interrupt can jam."""

import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue

Job = Callable[[], object]


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

    def submit(self, job: Job) -> None:
        """Run `job`, which must not raise, as soon as a thread is free."""
        self._jobs.put(job)

    def shutdown(self) -> None:
        """Finish the jobs handed over so far and end the threads. Safe to call twice."""
        self._end()
        for thread in self._threads:
            thread.join()


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
