"""Starts the contestants of one residency, gives each its memory, and lets them load."""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import psutil

from moe_runtime.errors import ContestantError
from moe_runtime.expert_memory import format_bytes
from moe_runtime.measure.bench.contestant_process import ContestantProcess
from moe_runtime.measure.bench.gate import Logits
from moe_runtime.measure.bench.job import Job
from moe_runtime.measure.bench.memory_group import MemoryGroups
from moe_runtime.measure.bench.page_cache import drop_from_page_cache
from moe_runtime.measure.peers.catalog import PEERS, Contestant
from moe_runtime.trace import Trace

# The gate may take longer than a turn, so that slow contestants too compare a few tokens.
_GATE_SECONDS = 15.0


@dataclass(slots=True)
class Seat:
    """One contestant while it takes part: its process, its memory, and what went wrong."""

    contestant: Contestant
    process: ContestantProcess
    own_bytes: int
    cap_bytes: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)


class Sitting:
    """The processes of one residency. A context manager that ends them and removes their files.

    `rows` are replayed by all, if there are any. `weight_bytes` is what each may hold for weights
    and buffers, None for as much as it likes. With equal totals everybody gets that plus the
    largest own memory among them, else plus its own.
    """

    def __init__(
        self,
        job: Job,
        rows: Trace | None,
        groups: MemoryGroups | None,
        *,
        weight_bytes: int | None,
        equal_totals: bool,
        on_stage: Callable[[str], None],
    ) -> None:
        self.seats: dict[str, Seat] = {}
        self.failures: dict[str, ContestantError] = {}
        self._job = job
        self._rows = rows
        self._groups = groups
        self._weight_bytes = weight_bytes
        self._equal_totals = equal_totals
        self._on_stage = on_stage
        self._stack = ExitStack()
        self._folder = Path()
        self._reference: ContestantProcess | None = None
        self._largest_own_bytes = 0

    @property
    def reference(self) -> ContestantProcess:
        """Unmodified transformers with all weights in memory."""
        assert self._reference is not None, "start() comes first"
        return self._reference

    def start(self, contestants: list[Contestant]) -> None:
        """Start the reference, then `contestants`, and load them.

        Who fails is in `failures` and not in `seats`. Raises ContestantError if the reference does.
        """
        self._on_stage("loading the reference, unmodified transformers")
        reference = self._open(PEERS["transformers"])
        reference.process.load(self._job)
        self._reference = reference.process
        seats = {}
        for contestant in contestants:
            if contestant.module == reference.contestant.module:
                self.seats[contestant.name] = reference  # one process serves both
                continue
            try:
                seats[contestant.name] = self._open(contestant)
            except ContestantError as error:
                self.failures[contestant.name] = error
        self._largest_own_bytes = max((seat.own_bytes for seat in seats.values()), default=0)
        for name, seat in seats.items():
            self._on_stage(f"loading {seat.contestant.title}")
            try:
                self.seats[name] = self._load(seat)
            except ContestantError as error:
                self.failures[name] = error
        self._drop_files()

    def fail(self, name: str, error: ContestantError) -> None:
        """`name` takes no further part."""
        self.failures[name] = error
        self.seats.pop(name).process.close()

    def logits(
        self, process: ContestantProcess, variant: str, tokens: tuple[int, ...], first_row: int
    ) -> tuple[Logits, int]:
        """`[T, V]` of as many tokens as fit the time of the gate, and their number."""
        file = self._folder / "logits.npy"
        turn = process.run(
            tokens, variant=variant, first_row=first_row, seconds=_GATE_SECONDS, logits=file
        )
        found: Logits = np.load(file)
        file.unlink()
        return found, turn.num_tokens

    def __enter__(self) -> "Sitting":
        scratch = self._job.scratch
        scratch.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix="bench-", dir=scratch)
        self._folder = Path(self._stack.enter_context(temporary))
        if self._rows is not None:
            replay = self._folder / "replay.npz"
            self._rows.save(replay)
            self._job = replace(self._job, replay=replay)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _open(self, contestant: Contestant) -> Seat:
        group = None if self._groups is None else self._groups.new(contestant.module)
        process = ContestantProcess(
            contestant.module, group=group, log=self._folder / f"{contestant.module}.log"
        )
        self._stack.enter_context(process)
        return Seat(contestant=contestant, process=process, own_bytes=process.own_bytes())

    def _load(self, seat: Seat) -> Seat:
        """Load within the cap; who cannot even do that may load first and is capped then."""
        job = self._job_of(seat)
        seat.cap_bytes = self._cap_of(seat)
        if seat.cap_bytes is None:
            self._check_free_memory(seat.contestant)
            seat.facts = seat.process.load(job)
            return seat
        self._drop_files()
        seat.process.limit(seat.cap_bytes)
        try:
            seat.facts = seat.process.load(job)
            return seat
        except ContestantError as error:
            seat.process.close()
            # Only what keeps experts on disk may hold less later than while it loads.
            if not error.is_memory or not seat.contestant.is_offload_only:
                raise
        self._on_stage(f"loading {seat.contestant.title} again, without a cap until it has loaded")
        again = self._open(seat.contestant)
        cap_bytes = again.cap_bytes = self._cap_of(again)
        assert cap_bytes is not None
        try:
            again.facts = again.process.load(job)
            again.facts["loaded"] = "before the cap was set, as it does not survive loading in it"
            self._drop_files()
            again.process.limit(cap_bytes)
        except ContestantError:
            again.process.close()
            raise
        return again

    def _check_free_memory(self, contestant: Contestant) -> None:
        """Without a cap, better no row than a machine that runs out of memory."""
        files = self._job.checkpoint.glob("*.safetensors")
        needed = int(contestant.memory_per_weight * sum(file.stat().st_size for file in files))
        free = psutil.virtual_memory().available
        if needed > free:
            raise ContestantError(
                f"not started: it takes about {format_bytes(needed)}, and {format_bytes(free)} are "
                "free beside the others; take fewer --layers, or fewer --peers",
                is_memory=True,
            )

    def _job_of(self, seat: Seat) -> Job:
        scratch = self._folder / seat.contestant.module
        scratch.mkdir(exist_ok=True)
        memory_bytes = self._weight_bytes
        if memory_bytes is not None and self._equal_totals:
            memory_bytes += self._largest_own_bytes - seat.own_bytes
        return replace(self._job, scratch=scratch, memory_bytes=memory_bytes)

    def _cap_of(self, seat: Seat) -> int | None:
        if self._groups is None or self._weight_bytes is None:
            return None
        own_bytes = self._largest_own_bytes if self._equal_totals else seat.own_bytes
        return self._weight_bytes + own_bytes

    def _drop_files(self) -> None:
        files = [self._job.checkpoint, self._folder]
        drop_from_page_cache(files if self._job.gguf is None else [*files, self._job.gguf])
