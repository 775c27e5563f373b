"""Whether the next passes run as two groups that take turns: by a model, then by the clock."""

from collections import deque
from collections.abc import Iterable
from statistics import median
from typing import Any

from moe_runtime.offline.group_model import GroupModel, PassTimes

_LEAST_GAIN = 0.05  # that the model must promise before anything is tried
_LEAST_KEPT_GAIN = 0.02  # that the clock must show before two groups stay
_NUM_RECENT = 3  # passes that the model looks at
_NUM_COMPARED = 5  # passes of each kind in a trial
_CLEAR_LOSS = 0.1  # that ends one sooner
_LEAST_COMPARED = 2
_MOST_TRIED = 8  # of each kind, those of another size included
_NUM_REST = 64  # passes between trials; twice as many after each that was for nothing


class GroupChoice:
    """One group or two for the next pass, as `setting` ("1", "2" or "auto") says.

    Auto: where the model promises that passes like the last ones gain a few per cent, passes of one
    size run in two groups and in one, by turns, and the kind with the lower median of seconds a
    token stays; it is asked again after some dozen passes, and later each time that two groups
    lost. With a `refusal`, which says why there cannot be two, there is one.
    """

    def __init__(self, setting: str, model: GroupModel, *, refusal: str = "") -> None:
        self.num_groups = 1
        self.shares = (1, 1)  # threads for products and for attention, where there are two
        self._setting = setting
        self._model = model
        self._refusal = refusal
        self._recent: deque[PassTimes] = deque(maxlen=_NUM_RECENT)  # in one group
        self._trial: _Trial | None = None
        self._last_trial: _Trial | None = None
        self._kept = 1
        self._num_left = 0  # passes until the next trial
        self._num_trials = 0
        self._num_lost = 0
        self._num_passes = {1: 0, 2: 0}

    @property
    def is_settled_on_one(self) -> bool:
        """Whether the passes to come have no use for threads of groups."""
        return self.num_groups == 1 and self._trial is None

    def add(self, times: PassTimes) -> None:
        """A pass that could be cut in two ran as `num_groups` said."""
        self._num_passes[times.num_groups] += 1
        if times.num_groups == 1:
            self._recent.append(times)
        if self._refusal or self._setting == "1":
            return
        if self._setting == "2":  # one pass in one group tells how to share the threads
            self._kept = 2
            self._run_two()
        elif self._trial is not None:
            self._follow(self._trial, times)
        else:
            self._num_left -= 1
            if self._num_left <= 0 and self._is_worth_trying():
                self._trial = _Trial()
                self._run_two()

    def report(self) -> dict[str, Any]:
        """What was chosen, and on what grounds. Seconds are of passes of one size."""
        trial = self._last_trial
        return {
            "setting": self._setting,
            "groups": self._kept,
            "refusal": self._refusal or None,
            "passes_in_one": self._num_passes[1],
            "passes_in_two": self._num_passes[2],
            "trials": self._num_trials,
            "one_token_seconds": None if trial is None else trial.token_seconds(1),
            "two_token_seconds": None if trial is None else trial.token_seconds(2),
            "attention_share": self._median(
                times.attention_seconds / times.seconds for times in self._recent
            ),
            "predicted_gain": self._median(self._gains()),
        }

    def _run_two(self) -> None:
        """Run the next passes in two groups, threads shared by the last pass in one."""
        self.num_groups = 2
        num_attention = self._model.attention_threads(self._recent[-1])
        self.shares = (max(1, self._model.num_threads - num_attention), num_attention)

    def _is_worth_trying(self) -> bool:
        if self._kept == 2:
            return True
        is_known = len(self._recent) == _NUM_RECENT
        return is_known and median(self._gains()) >= _LEAST_GAIN

    def _follow(self, trial: "_Trial", times: PassTimes) -> None:
        trial.add(times)
        if not trial.is_over:
            self.num_groups = 3 - times.num_groups
            return
        self._kept = 2 if trial.is_won else 1
        self._num_lost = 0 if trial.is_won else self._num_lost + 1
        self._num_left = _NUM_REST << max(0, self._num_lost - 1)
        self._num_trials += 1
        self.num_groups, self._last_trial, self._trial = self._kept, trial, None

    def _gains(self) -> list[float]:
        return [self._model.gain(times) for times in self._recent]

    def _median(self, figures: Iterable[float]) -> float | None:
        figures = list(figures)
        return median(figures) if figures else None


class _Trial:
    """Passes of one size in two groups and in one, by turns; the first of each is to warm up."""

    def __init__(self) -> None:
        self._tried: dict[int, list[PassTimes]] = {1: [], 2: []}

    def add(self, times: PassTimes) -> None:
        self._tried[times.num_groups].append(times)

    @property
    def is_over(self) -> bool:
        return self._is_lost or all(
            len(self._like(kind)) == _NUM_COMPARED or len(tried) > _MOST_TRIED
            for kind, tried in self._tried.items()
        )

    @property
    def is_won(self) -> bool:
        """Whether two groups were faster, as far as passes could be compared."""
        one, two = self.token_seconds(1), self.token_seconds(2)
        return one is not None and two is not None and two < (1 - _LEAST_KEPT_GAIN) * one

    def token_seconds(self, num_groups: int) -> float | None:
        """The median; None where too few passes were of one size."""
        like = self._like(num_groups)
        if len(like) < _LEAST_COMPARED:
            return None
        return median(times.token_seconds for times in like)

    @property
    def _is_lost(self) -> bool:
        """Whether two groups are so much slower that no more passes need to show it."""
        one, two = self.token_seconds(1), self.token_seconds(2)
        return one is not None and two is not None and two > (1 + _CLEAR_LOSS) * one

    def _like(self, num_groups: int) -> list[PassTimes]:
        passes = sorted(self._tried[1] + self._tried[2], key=lambda times: times.num_tokens)
        pattern = passes[len(passes) // 2]
        return [times for times in self._tried[num_groups][1:] if times.is_like(pattern)][
            :_NUM_COMPARED
        ]
