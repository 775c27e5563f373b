"""What a run did, over time: the numbers behind a report's charts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moe_runtime.expert import ExpertKey
from moe_runtime.trace_fields import Array

Span = tuple[float, float]  # from when to when, in seconds since the recording began

# What the computing thread does, one at a time; and what goes on beside it.
DENSE, EXPERTS, PLAN, WAIT = "dense", "experts", "plan", "wait"
# Python's garbage collector stops every thread, whatever lane that one is in.
DISK, COPY, GARBAGE = "disk", "copy", "garbage"
LANES = (DENSE, EXPERTS, PLAN, WAIT, DISK, COPY, GARBAGE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """One call of the model; `num_tokens` of all its sequences together."""

    span: Span
    num_tokens: int
    is_decode: bool  # one token a sequence

    @property
    def seconds(self) -> float:
        return self.span[1] - self.span[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardTotals:
    """Of all forwards of one kind."""

    num_forwards: int
    num_tokens: int
    seconds: float

    def plus(self, forward: Forward) -> "ForwardTotals":
        """With one more."""
        return ForwardTotals(
            num_forwards=self.num_forwards + 1,
            num_tokens=self.num_tokens + forward.num_tokens,
            seconds=self.seconds + forward.seconds,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """The experts that one layer asked for in a forward, ascending."""

    keys: Sequence[ExpertKey]
    forward: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstForwards:
    """The run's first forwards in full, as far as memory was given for them.

    Enough to play them again: `is_whole` says whether they are all there were.
    """

    forwards: Sequence[Forward]
    visits: Sequence[Visit]
    is_whole: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """What a RunRecorder kept. Sums cover the whole run; `recent_*` its last moments in full.

    L layers, B stretches of `forwards_per_bin` forwards, S stretches of `bin_seconds`.
    `began_at` is when time 0 was, by time.perf_counter().
    """

    began_at: float
    seconds: float
    prefill: ForwardTotals
    decode: ForwardTotals
    hits_LB: Array
    misses_LB: Array
    forward_seconds_B: Array
    forwards_per_bin: int
    lane_seconds: Mapping[str, float]  # all of LANES
    lane_seconds_S: Mapping[str, Array]
    bytes_read_S: Array
    bin_seconds: float
    recent_forwards: Sequence[Forward]
    recent_spans: Mapping[str, Sequence[Span]]  # lane -> since the first of recent_forwards
    first: FirstForwards

    @property
    def num_hits(self) -> int:
        return int(self.hits_LB.sum())

    @property
    def num_misses(self) -> int:
        return int(self.misses_LB.sum())

    @property
    def num_forwards(self) -> int:
        return self.prefill.num_forwards + self.decode.num_forwards
