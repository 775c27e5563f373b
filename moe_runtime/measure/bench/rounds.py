"""Contestants take turns, round by round, on the same forced tokens."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import psutil

from moe_runtime.errors import ContestantError
from moe_runtime.measure.bench.contestant_process import ContestantProcess, Turn
from moe_runtime.measure.bench.disk_rate import DiskRate
from moe_runtime.measure.bench.link_rate import LinkRate

# A shared disk grants bursts: what reads first after a pause is served faster. So everything that
# reads the disk starts after the same pause, and raw reads before and after a turn last half as
# long as the turn, within these limits.
_PAUSE_SECONDS = 0.5
_FEWEST_RATE_SECONDS = 0.4
_MOST_RATE_SECONDS = 4.0

_TOKENS_PER_ROUND = 20
_FEWEST_ROUNDS = 12
_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The forced tokens of every round, and how long a turn may take.

    Tokens are forced because a random model's greedy decoding falls into a loop whose experts all
    stay cached. The first third of the rounds warms up and is not counted.
    """

    rounds: tuple[tuple[int, ...], ...]
    turn_seconds: float

    @classmethod
    def of(cls, *, num_steps: int, seconds: float, num_lanes: int, vocab_size: int) -> "Schedule":
        """`num_steps` random tokens in rounds of 20, or in fewer tokens if that made few rounds."""
        per_round = max(1, min(_TOKENS_PER_ROUND, num_steps // _FEWEST_ROUNDS))
        num_rounds = -(-num_steps // per_round)
        tokens = np.random.default_rng(_SEED).integers(0, vocab_size, (num_rounds, per_round))
        turn_seconds = seconds / num_rounds / max(1, num_lanes) - _PAUSE_SECONDS
        return cls(
            rounds=tuple(tuple(row) for row in tokens.tolist()),
            turn_seconds=max(turn_seconds, _PAUSE_SECONDS),
        )

    @property
    def num_rounds(self) -> int:
        return len(self.rounds)

    @property
    def tokens_per_round(self) -> int:
        return len(self.rounds[0])

    @property
    def first_counted(self) -> int:
        """The first round that counts."""
        return self.num_rounds // 3

    def first_row(self, round_index: int) -> int:
        """The row of a replayed trace that belongs to the first token of a round."""
        return round_index * self.tokens_per_round


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """One row of the table while it is measured: a process, and what it is told to be.

    The turns of a lane that `is_rated` are held against the rate of the disk, or of the link to the
    GPU.
    """

    name: str
    process: ContestantProcess
    variant: str
    reads_disk: bool
    is_rated: bool = False


@dataclass(slots=True)
class Measured:
    """Turns by lane, one a round until it failed; for rated lanes the GB/s of reads beside each."""

    turns: dict[str, list[Turn]] = field(default_factory=dict)
    failures: dict[str, ContestantError] = field(default_factory=dict)
    rates_gbps: dict[str, list[float]] = field(default_factory=dict)
    rate_settings: list[dict[str, Any]] = field(default_factory=list)  # what read, and its median
    other_cores: float = 0.0  # that other programs kept busy meanwhile, on average

    def fail(self, lane: str, error: ContestantError) -> None:
        self.failures[lane] = error
        self.turns.pop(lane, None)

    def part(self, prefix: str) -> "Measured":
        """Only the lanes whose names start with `prefix`, which is taken off."""
        return replace(
            self,
            turns=_with_prefix(self.turns, prefix),
            failures=_with_prefix(self.failures, prefix),
            rates_gbps=_with_prefix(self.rates_gbps, prefix),
        )


def take_turns(
    lanes: Sequence[Lane],
    schedule: Schedule,
    rate: DiskRate | LinkRate | None,
    on_round: Callable[[int, int], None],
) -> Measured:
    """Each lane decodes each round's tokens, the others asleep; the order moves on every round.

    A lane that fails is left out from there on.
    """
    found = Measured(turns={lane.name: [] for lane in lanes})
    processes = {id(lane.process): lane.process for lane in lanes}.values()
    start, busy_before = time.monotonic(), _busy_seconds(processes)
    for index in range(schedule.num_rounds):
        on_round(index, schedule.num_rounds)
        first = index % len(lanes)
        for lane in (*lanes[first:], *lanes[:first]):
            if lane.name in found.failures:
                continue
            try:
                if lane.is_rated and rate is not None:
                    _take_rated_turn(lane, schedule, index, rate, found)
                else:
                    found.turns[lane.name].append(_take_turn(lane, schedule, index))
            except ContestantError as error:
                found.fail(lane.name, error)
    others = _busy_seconds(processes) - busy_before
    found.other_cores = max(0.0, others / (time.monotonic() - start))
    if rate is not None:
        found.rate_settings = rate.as_list()
    return found


def _take_turn(lane: Lane, schedule: Schedule, index: int) -> Turn:
    if lane.reads_disk:
        time.sleep(_PAUSE_SECONDS)
    return lane.process.run(
        schedule.rounds[index],
        variant=lane.variant,
        first_row=schedule.first_row(index),
        seconds=schedule.turn_seconds,
    )


def _take_rated_turn(
    lane: Lane, schedule: Schedule, index: int, rate: DiskRate | LinkRate, found: Measured
) -> None:
    """Reads, the turn, reads: a rate drifts, and the mean of both sides is the turn's."""
    turns = found.turns[lane.name]
    half_seconds = sum(turns[-1].milliseconds) / 2e3 if turns else 0.0
    half_seconds = min(max(half_seconds, _FEWEST_RATE_SECONDS), _MOST_RATE_SECONDS)
    time.sleep(_PAUSE_SECONDS)
    before_bytes, before_seconds = rate.read(index, half_seconds)
    turns.append(_take_turn(lane, schedule, index))
    time.sleep(_PAUSE_SECONDS)
    after_bytes, after_seconds = rate.read(index, half_seconds)
    rate_gbps = (before_bytes + after_bytes) / (before_seconds + after_seconds) / 1e9
    found.rates_gbps.setdefault(lane.name, []).append(rate_gbps)


def _with_prefix(found: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {
        name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)
    }


def _busy_seconds(processes: Iterable[ContestantProcess]) -> float:
    """Processor time since the machine started that neither `processes` nor we have taken."""
    times = psutil.cpu_times()
    busy = sum(times) - times.idle - getattr(times, "iowait", 0.0)
    own = psutil.Process().cpu_times()
    return busy - own.user - own.system - sum(process.cpu_seconds() for process in processes)
