"""A contestant's process, seen from the benchmark: requests, answers, and how it ended."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from moe_runtime.errors import ContestantError
from moe_runtime.expert_memory import format_bytes
from moe_runtime.measure.bench.job import Job
from moe_runtime.measure.bench.memory_group import MemoryGroup

# A full checkpoint over a slow disk, merged and written once more, stays well below.
_LOAD_SECONDS = 900.0
_TURN_SECONDS = 300.0
_QUIT_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What one contestant did in one round. `bytes_read` is what the block layer read for it."""

    milliseconds: tuple[float, ...]
    bytes_read: int
    counters: dict[str, int]

    @property
    def num_tokens(self) -> int:
        return len(self.milliseconds)

    @property
    def mean_ms(self) -> float:
        # Misses differ from token to token, so what is compared with bytes must be a mean.
        return sum(self.milliseconds) / len(self.milliseconds)


class ContestantProcess:
    """Starts a worker, in `group` if there is one; a context manager that ends it.

    Requests raise ContestantError when the contestant fails, dies or takes far too long; it can not
    be asked anything afterwards.
    """

    def __init__(self, module: str, *, group: MemoryGroup | None, log: Path) -> None:
        self.group = group
        self._log = log
        self._limit_bytes: int | None = None
        self._peak_resident_bytes = 0
        self._cpu_seconds = 0.0
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "moe_runtime.measure.bench.worker", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=_environment(),
                start_new_session=True,  # an interrupt is for the benchmark, which ends us in order
            )
        try:
            if group is not None:
                group.add(self._process.pid)
            self._ask({"do": "import"}, _LOAD_SECONDS)
        except BaseException:
            self.close()
            raise

    def own_bytes(self) -> int:
        """What it holds now: as its group counts it, else what is resident."""
        if self.group is not None:
            return self.group.own_bytes()
        return int(psutil.Process(self._process.pid).memory_info().rss)

    def limit(self, num_bytes: int) -> None:
        """Cap its group from here on."""
        assert self.group is not None
        self._limit_bytes = num_bytes
        if not self.group.limit(num_bytes):
            raise ContestantError(f"needs more than {format_bytes(num_bytes)}", is_memory=True)

    def load(self, job: Job) -> dict[str, Any]:
        """Let it load the model; returns its facts."""
        facts: dict[str, Any] = self._ask({"do": "load", "job": job.as_message()}, _LOAD_SECONDS)[
            "facts"
        ]
        return facts

    def run(
        self,
        tokens: Sequence[int],
        *,
        variant: str,
        first_row: int,
        seconds: float,
        logits: Path | None = None,
    ) -> Turn:
        """Decode `tokens` as a new sequence, as many as fit `seconds` and at least one."""
        before = self._bytes_read()
        request = {
            "do": "run",
            "tokens": list(tokens),
            "variant": variant,
            "first_row": first_row,
            "seconds": seconds,
            "logits": None if logits is None else str(logits),
        }
        answer = self._ask(request, seconds + _TURN_SECONDS)
        return Turn(
            milliseconds=tuple(answer["milliseconds"]),
            bytes_read=self._bytes_read() - before,
            counters=answer["counters"],
        )

    def peak_resident_bytes(self) -> int:
        """The most that was resident, mapped files included."""
        for line in self._proc_lines("status"):
            if line.startswith("VmHWM:"):
                self._peak_resident_bytes = int(line.split()[1]) * 1024
        return self._peak_resident_bytes

    def cpu_seconds(self) -> float:
        """Processor time that it has taken, all threads together; the last known once it ended."""
        try:
            times = psutil.Process(self._process.pid).cpu_times()
        except psutil.NoSuchProcess:
            return self._cpu_seconds
        self._cpu_seconds = float(times.user + times.system)
        return self._cpu_seconds

    def close(self) -> None:
        """End it, whatever state it is in."""
        process = self._process
        try:
            if process.poll() is None and process.stdin is not None:
                process.stdin.write('{"do": "quit"}\n')
                process.stdin.flush()
                process.wait(_QUIT_SECONDS)
        except (OSError, subprocess.TimeoutExpired):
            pass
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    try:
                        pipe.close()
                    except OSError:  # a request that it never read
                        pass

    def __enter__(self) -> "ContestantProcess":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        was_late = threading.Event()

        def end() -> None:
            was_late.set()
            process.kill()

        watchdog = threading.Timer(seconds, end)
        watchdog.start()
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            watchdog.cancel()
        if not line:
            raise self._death(request["do"], seconds if was_late.is_set() else None)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ContestantError(answer["error"], is_memory=False)
        return answer

    def _death(self, during: str, late_after_seconds: float | None) -> ContestantError:
        code = self._process.wait()
        if late_after_seconds is not None:
            return ContestantError(
                f"did not answer '{during}' in {late_after_seconds:.0f} s", is_memory=False
            )
        if self.group is not None and self._limit_bytes is not None and self.group.was_killed():
            return ContestantError(
                f"needs more than {format_bytes(self._limit_bytes)}", is_memory=True
            )
        if code == -9:
            return ContestantError("was killed; the machine ran out of memory", is_memory=True)
        last = self._log.read_text(errors="replace").strip().rpartition("\n")[2]
        return ContestantError(
            f"ended with exit code {code} during '{during}'{f': {last}' if last else ''}",
            is_memory=False,
        )

    def _bytes_read(self) -> int:
        for line in self._proc_lines("io"):
            if line.startswith("read_bytes:"):
                return int(line.split()[1])
        return 0

    def _proc_lines(self, name: str) -> list[str]:
        try:
            return Path(f"/proc/{self._process.pid}/{name}").read_text().splitlines()
        except OSError:  # it has ended, or this is not Linux
            return []


def _environment() -> dict[str, str]:
    """Children import the moe_runtime that runs here, and say nothing of their own accord."""
    package_root = str(Path(__file__).resolve().parents[3])
    paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
