"""Whether reading ahead is worth it, from what forwards took: numbers in, a decision out.

Per forward, with h reads that were done when they were demanded, r seconds a read, w reads for
nothing, of which a demand waits for the piece under way (a share c of a read) at most, g reads of
what had made room, and a predictor that takes p seconds:

    gain = min(h r, idle, stall) - g r - w c r - p - b

Time saved is bounded by what the disk is idle and by what compute waits, so by the overlap of
copies and compute; both bounds are of forwards without reads ahead. b is by how much longer compute
takes with reads beside it, once forwards of both kinds were seen: where one memory serves both, or
threads that read and threads that compute share cores, what is saved waiting may be lost there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from moe_runtime.scheduling.prefetch import PrefetchCounts

# Of a forward's time: what a predictor may cost, and from what gain on it is worth a start.
MOST_COST = 0.02
LEAST_GAIN = 0.01
_HOPELESS_COST = 2 * MOST_COST  # ends a trial at once
_TRIAL_FORWARDS = 8
_UNCOUNTED = 2  # of a trial: what runs first runs slowly
_COMPARED = _TRIAL_FORWARDS  # of each kind, before a difference of compute is believed
_FIRST_PAUSE, _LONGEST_PAUSE = 64, 1024  # forwards until the next trial; doubled each time
MEAN_RATE = 1 / 8
_COST_RATE = 1 / 32  # of what changes little, and where one slow forward must not decide


class Mode(StrEnum):
    """What a gate lets happen."""

    TRIAL = "trial"  # the predictor speaks, and nothing is read for it
    ON = "on"
    OFF = "off"


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardFacts:
    """What one forward took. In a trial `counts` are what would have become of reads ahead.

    `read_seconds` of one demanded expert; None: none was read.
    """

    num_visits: int
    seconds: float
    predictor_seconds: float
    stall_seconds: float
    idle_seconds: float
    read_seconds: float | None
    counts: PrefetchCounts


@dataclass(slots=True)
class Means:
    """Averages over forwards: plain ones at first, moving ones later; 0 before the first."""

    values: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, rate: float, **found: float) -> None:
        """The latest of each counts for `rate` at least."""
        for name, value in found.items():
            count = self.counts[name] = self.counts.get(name, 0) + 1
            before = self.values.get(name, value)
            self.values[name] = before + max(rate, 1 / count) * (value - before)

    def drop(self, *names: str) -> None:
        """Begin anew with these."""
        for name in names:
            self.values.pop(name, None)
            self.counts.pop(name, None)

    def __getitem__(self, name: str) -> float:
        return self.values.get(name, 0.0)


class BenefitGate:
    """Starts with a trial, reads while it gains, and tries again after ever longer pauses."""

    def __init__(self, piece_share: float) -> None:
        self._piece_share = piece_share
        self._means = Means()
        self._mode = Mode.TRIAL
        self._why = "no forward yet"
        self._left = _TRIAL_FORWARDS + _UNCOUNTED  # forwards until this mode is looked at anew
        self._pause = _FIRST_PAUSE
        self._num_on = 0
        self._realised_seconds = 0.0

    @property
    def mode(self) -> Mode:
        return self._mode

    @property
    def is_listening(self) -> bool:
        """Whether the predictor is to speak."""
        return self._mode is not Mode.OFF

    @property
    def is_on(self) -> bool:
        """Whether experts are read ahead."""
        return self._mode is Mode.ON

    @property
    def read_seconds(self) -> float:
        """Of one expert, as demands took; 0 unknown."""
        return self._means["read"]

    @property
    def idle_seconds(self) -> float:
        """For which the disk is idle between two layers."""
        return self._means["idle"] / max(1.0, self._means["visits"])

    def add(self, facts: ForwardFacts) -> None:
        """A forward of a few tokens has ended."""
        self._left -= 1
        if self._mode is Mode.TRIAL and self._left >= _TRIAL_FORWARDS:
            return
        means = self._means
        means.add(_COST_RATE, step=facts.seconds)
        means.add(MEAN_RATE, visits=facts.num_visits, idle=facts.idle_seconds)
        if facts.read_seconds is not None:
            means.add(MEAN_RATE, read=facts.read_seconds)
        busy = facts.seconds - facts.stall_seconds - facts.predictor_seconds
        if self._mode is Mode.ON:
            means.add(_COST_RATE, busy_beside_reads=busy)
        else:
            means.add(MEAN_RATE, stall=facts.stall_seconds)
            means.add(_COST_RATE, busy=busy)
        if self._mode is not Mode.OFF:
            counts = facts.counts
            means.add(_COST_RATE, predictor=facts.predictor_seconds)
            means.add(
                MEAN_RATE,
                hidden=counts.hidden,
                wasted=counts.wasted,
                regrets=counts.regrets,
            )
        if self._mode is Mode.ON:
            self._num_on += 1
            self._realised_seconds += self._gain(
                facts.counts.hidden,
                facts.counts.regrets,
                facts.counts.wasted,
                facts.predictor_seconds,
            )
        self._decide()

    def fail(self, why: str) -> None:
        """Off for good."""
        self._mode, self._why, self._left = Mode.OFF, why, 2**62

    def report(self) -> dict[str, object]:
        """Milliseconds a layer and forward, and why."""
        visits = max(1.0, self._means["visits"])
        done = self._means["hidden"] + self._means["wasted"]
        return {
            "mode": str(self._mode),
            "why": self._why,
            "expected_gain_ms_per_layer": 1e3 * self._expected() / visits,
            "realised_gain_ms_per_layer": (
                1e3 * self._realised_seconds / self._num_on / visits if self._num_on else 0.0
            ),
            "forwards_on": self._num_on,
            "precision": self._means["hidden"] / done if done else None,
            "read_ms": 1e3 * self._means["read"],
            "idle_ms_per_layer": 1e3 * self.idle_seconds,
            "predictor_share_of_step": (
                self._means["predictor"] / self._means["step"] if self._means["step"] else None
            ),
        }

    def state(self) -> dict[str, object]:
        """What `restore` goes on from."""
        return {"mode": str(self._mode), "pause": self._pause, "means": dict(self._means.values)}

    def restore(self, state: Mapping[str, object]) -> None:
        """Go on as a gate that reported `state`. Raises KeyError, TypeError or ValueError."""
        mode, pause, means = Mode(str(state["mode"])), state["pause"], state["means"]
        if not isinstance(pause, int) or not isinstance(means, Mapping):
            raise TypeError("state of a gate is damaged")
        values = {str(name): float(value) for name, value in means.items()}
        if not all(0.0 <= value < float("inf") for value in values.values()):
            raise ValueError("state of a gate holds what cannot be")
        self._means = Means(values, dict.fromkeys(values, _TRIAL_FORWARDS))
        self._pause = min(max(pause, _FIRST_PAUSE), _LONGEST_PAUSE)
        if mode is Mode.ON:
            self._mode, self._why = mode, "it gained when this model ran last"

    def _gain(self, hidden: float, regrets: float, wasted: float, predictor: float) -> float:
        read = self._means["read"]
        saved = min(hidden * read, self._means["idle"], self._means["stall"])
        wrong = regrets * read + wasted * self._piece_share * read
        return saved - wrong - predictor - self._growth()

    def _growth(self) -> float:
        """Seconds that compute takes longer beside reads; 0 while too few forwards say so."""
        means = self._means
        if min(means.counts.get(name, 0) for name in ("busy", "busy_beside_reads")) < _COMPARED:
            return 0.0
        return max(0.0, means["busy_beside_reads"] - means["busy"])

    def _expected(self) -> float:
        means = self._means
        return self._gain(means["hidden"], means["regrets"], means["wasted"], means["predictor"])

    def _decide(self) -> None:
        means = self._means
        cost, step, gain = means["predictor"], means["step"], self._expected()
        per_layer = f"{1e3 * gain / max(1.0, means['visits']):.3f} ms a layer"
        if self._mode is Mode.OFF:
            if self._left <= 0:
                self._mode, self._why = Mode.TRIAL, "trying again after a pause"
                self._left = _TRIAL_FORWARDS + _UNCOUNTED
                means.drop("predictor", "hidden", "wasted", "regrets", "busy_beside_reads")
        elif self._mode is Mode.TRIAL and self._left > 0 and cost <= _HOPELESS_COST * step:
            self._why = f"a trial, {self._left} forwards to go"
        elif cost > MOST_COST * step:
            self._pause = _LONGEST_PAUSE  # it will cost no less so soon
            self._turn_off(f"the predictor takes {cost / step:.1%} of a step, over {MOST_COST:.0%}")
        elif self._mode is Mode.TRIAL:
            if gain > LEAST_GAIN * step:
                self._mode, self._why = Mode.ON, f"expected gain {per_layer}"
                self._left = _FIRST_PAUSE
            else:
                self._turn_off(
                    f"expected gain {per_layer}, and {LEAST_GAIN:.0%} of a step is asked for"
                )
        elif gain < 0.0:
            self._turn_off(f"expected gain {per_layer}")
        else:
            self._why = f"expected gain {per_layer}"
            if self._left <= 0:  # it lasted: should it end, the first pause is a short one
                self._pause = _FIRST_PAUSE

    def _turn_off(self, why: str) -> None:
        self._mode, self._why = Mode.OFF, why
        self._left = self._pause
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
