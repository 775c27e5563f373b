"""Contestants take turns, round by round, on the same forced tokens."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import psutil

from moe_runtime.errors import ContestantError
from moe_runtime.measure.bench.contestant_process import ContestantProcess, Turn
from moe_runtime.measure.random_read import RandomReads

# A shared disk grants bursts: what reads first after a pause is served faster. So every contestant
# of the disk starts after the same pause, and raw reads last as long as the round's longest turn,
# within these limits.
_PAUSE_SECONDS = 0.5
_RATE_SECONDS = 0.8
_MOST_RATE_SECONDS = 5.0
RATE_SETTINGS = ((2**20, 2), (2**20, 8), (5 * 2**20, 2))  # block bytes, blocks at a time

_TOKENS_PER_ROUND = 20
_FEWEST_ROUNDS = 12
_SEED = 0

Rate = tuple[int, int]


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
    """One row of the table while it is measured: a process, and what it is told to be."""

    name: str
    process: ContestantProcess
    variant: str
    reads_disk: bool


@dataclass(slots=True)
class Measured:
    """Turns by lane, one a round until it failed; GB/s of direct reads by setting."""

    turns: dict[str, list[Turn]] = field(default_factory=dict)
    failures: dict[str, ContestantError] = field(default_factory=dict)
    rates_gbps: dict[Rate, list[float]] = field(default_factory=dict)
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
        )

    def as_rates(self) -> list[dict[str, Any]]:
        """What `--json` prints of the direct reads."""
        return [
            {"block_bytes": block, "blocks_at_a_time": depth, "gbps": float(np.median(values))}
            for (block, depth), values in self.rates_gbps.items()
        ]

    def best_rate_gbps(self) -> float | None:
        """The best setting's median; None where nothing was read directly."""
        return max((float(np.median(values)) for values in self.rates_gbps.values()), default=None)


def take_turns(
    lanes: Sequence[Lane],
    schedule: Schedule,
    reads: RandomReads | None,
    on_round: Callable[[int, int], None],
) -> Measured:
    """Each lane decodes each round's tokens, the others asleep; the order moves on every round.

    A lane that fails is left out from there on. `reads` measures the disk between rounds.
    """
    found = Measured(turns={lane.name: [] for lane in lanes})
    processes = {id(lane.process): lane.process for lane in lanes}.values()
    start, busy_before = time.monotonic(), _busy_seconds(processes)
    for index, tokens in enumerate(schedule.rounds):
        on_round(index, schedule.num_rounds)
        first = index % len(lanes)
        longest_seconds = 0.0
        for lane in (*lanes[first:], *lanes[:first]):
            if lane.name in found.failures:
                continue
            if lane.reads_disk:
                time.sleep(_PAUSE_SECONDS)
            try:
                turn = lane.process.run(
                    tokens,
                    variant=lane.variant,
                    first_row=schedule.first_row(index),
                    seconds=schedule.turn_seconds,
                )
            except ContestantError as error:
                found.fail(lane.name, error)
            else:
                found.turns[lane.name].append(turn)
                if lane.reads_disk:
                    longest_seconds = max(longest_seconds, sum(turn.milliseconds) / 1e3)
        if reads is not None:
            setting = RATE_SETTINGS[index % len(RATE_SETTINGS)]
            time.sleep(_PAUSE_SECONDS)
            rate = reads.rate_gbps(
                block_bytes=setting[0],
                num_threads=setting[1],
                seconds=max(_RATE_SECONDS, min(longest_seconds, _MOST_RATE_SECONDS)),
            )
            found.rates_gbps.setdefault(setting, []).append(rate)
    others = _busy_seconds(processes) - busy_before
    found.other_cores = max(0.0, others / (time.monotonic() - start))
    return found


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
