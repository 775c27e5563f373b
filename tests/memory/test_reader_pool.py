"""Laws of the reader pool: every job runs once, and no thread outlives the pool."""

import gc
import subprocess
import sys
import threading
import time
import weakref

import pytest

from moe_runtime.memory.reader_pool import ReaderPool
from tests.command_line import ROOT

NAME = "pool-under-test"


def num_threads() -> int:
    return sum(thread.name.startswith(NAME) for thread in threading.enumerate())


def wait_for_threads(count: int) -> None:
    deadline = time.monotonic() + 5
    while num_threads() != count and time.monotonic() < deadline:
        time.sleep(0.001)
    assert num_threads() == count


@pytest.mark.parametrize("count", [1, 3])
def test_every_job_runs_once(count: int) -> None:
    """Law: all jobs handed over before shutdown() have run when it returns."""
    done: list[int] = []
    pool = ReaderPool(count, NAME)
    assert num_threads() == count
    for number in range(500):
        pool.submit(lambda n=number: done.append(n))
    pool.shutdown()
    pool.shutdown()
    assert sorted(done) == list(range(500))
    assert count > 1 or done == list(range(500))
    assert num_threads() == 0


def test_forgotten_pool_ends() -> None:
    """Law: a pool that is dropped finishes its jobs and ends its threads."""
    done = threading.Event()
    pool = ReaderPool(2, NAME)
    pool.submit(lambda: time.sleep(0.02))
    pool.submit(done.set)
    del pool
    gc.collect()
    assert done.wait(5)
    wait_for_threads(0)


def test_finished_jobs_are_not_kept() -> None:
    """Law: an idle thread keeps nothing of its last job alive."""

    class Owner:
        """What a job belongs to."""

    owner, gone = Owner(), threading.Event()
    finalizer = weakref.finalize(owner, gone.set)
    pool = ReaderPool(1, NAME)
    pool.submit(lambda kept=owner: kept)
    del owner
    assert gone.wait(5)
    assert not finalizer.alive
    pool.shutdown()


def test_a_program_may_end_while_jobs_are_under_way() -> None:
    """Law: what runs is awaited, what waits is dropped, and the program ends as it would."""
    program = """
import threading, time, torch
from moe_runtime.memory.reader_pool import ReaderPool
from tests.command_line import ROOT
pool = ReaderPool(2, "pool")
matrix = torch.ones(600, 600)
begun = threading.Barrier(3)
def job():
    begun.wait()
    for _ in range(20):
        torch.mm(matrix, matrix)
pool.submit(job)
pool.submit(job)
pool.submit(lambda: print("a job that waited was run"))
begun.wait()
"""
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
