"""Runs independent pieces of a solver in processes, and lets them end early with what they have."""

import mmap
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

import numpy as np

from moe_runtime.errors import PlacementError
from moe_runtime.placement.result import StoppedBy

T = TypeVar("T")
Job = Callable[["Control"], T]
Progress = Callable[[int, int], None]  # pieces of work done, and in all

_POLL_SECONDS = 0.1


class Control:
    """When to stop: a deadline on the monotonic clock, or an interrupt; shared with the workers."""

    def __init__(self, time_limit_seconds: float) -> None:
        self._deadline = time.monotonic() + time_limit_seconds
        self._shared = np.frombuffer(mmap.mmap(-1, mmap.PAGESIZE), np.int64)  # survives a fork
        self.was_interrupted = False  # in the process that started the workers

    def remaining_seconds(self) -> float:
        return max(self._deadline - time.monotonic(), 0.0)

    def should_stop(self) -> bool:
        return bool(self._shared[0]) or time.monotonic() >= self._deadline

    def interrupt(self) -> None:
        self._shared[0] = 1
        self.was_interrupted = True

    def advance(self, pieces: int = 1) -> None:
        """Count work as done; a count lost between two processes only moves the progress bar."""
        self._shared[1] += pieces

    @property
    def done(self) -> int:
        return int(self._shared[1])

    @property
    def stopped_by(self) -> StoppedBy | None:
        """Why to stop, if so."""
        if self.was_interrupted:
            return StoppedBy.INTERRUPTED
        return StoppedBy.TIME_LIMIT if self.should_stop() else None


class _Failure(Generic[T]):
    """What a worker raised."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def default_processes() -> int:
    """One for each core that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(
    jobs: Sequence[Job[T]],
    control: Control,
    *,
    num_processes: int,
    on_progress: Callable[[], None] | None = None,
) -> list[T]:
    """Results of `jobs` in their order; every job runs, so each must end soon once told to stop.

    Job i runs in process i modulo the number of processes, which shares this process's memory as
    it was (fork): nothing is pickled but results. Ctrl-C tells the jobs to stop and is recorded
    in `control`; a second one ends the workers and is raised.
    """
    context: Any = multiprocessing.get_context("fork")
    num_processes = max(min(num_processes, len(jobs)), 1)
    results: dict[int, T] = {}
    workers: list[Any] = []
    readers: list[Connection] = []
    try:
        for rank in range(num_processes):
            reader, writer = context.Pipe(duplex=False)
            mine = range(rank, len(jobs), num_processes)
            worker = context.Process(target=_work, args=(jobs, mine, control, writer), daemon=True)
            worker.start()
            writer.close()
            workers.append(worker)
            readers.append(reader)
        while readers:
            try:
                _collect(readers, results)
                if on_progress is not None:
                    on_progress()
            except KeyboardInterrupt:
                if control.was_interrupted:
                    raise
                control.interrupt()
    finally:
        for worker in workers:
            if readers:  # left early: nobody waits for their results
                worker.terminate()
            worker.join()
    if len(results) < len(jobs):
        codes = sorted({worker.exitcode for worker in workers if worker.exitcode})
        raise PlacementError(
            f"a process of the search died with exit code {codes}; with -9 the machine ran out of "
            "memory: give fewer processes"
        )
    return [results[index] for index in range(len(jobs))]


def _collect(readers: list[Connection], results: dict[int, T]) -> None:
    for reader in wait(readers, timeout=_POLL_SECONDS):
        assert isinstance(reader, Connection)
        try:
            index, result = reader.recv()
        except EOFError:
            readers.remove(reader)
            continue
        if isinstance(result, _Failure):
            raise result.error
        results[index] = result


def _work(jobs: Sequence[Job[T]], mine: range, control: Control, writer: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    for index in mine:
        result: T | _Failure[T]
        try:
            result = jobs[index](control)
        except Exception as error:
            result = _Failure(error)
        writer.send((index, result))
    writer.close()
