"""What a missing expert costs each way, learned from what earlier ones took."""

from dataclasses import dataclass, field

# The weight of the newest sample once there are many: old enough to be calm, new enough to follow a
# machine whose memory rate flips within minutes. The first samples count alike.
_NEWEST_SHARE = 0.1


@dataclass(slots=True)
class MovingAverage:
    """An exponential average; the plain one until `_NEWEST_SHARE` is the larger share."""

    value: float = 0.0
    num_samples: int = 0

    def add(self, sample: float) -> None:
        self.num_samples += 1
        self.value += (sample - self.value) * max(1 / self.num_samples, _NEWEST_SHARE)


@dataclass(slots=True)
class TokenCost:
    """Seconds of one expert over its number of tokens, in classes of up to 1, 2, 4, 8 ... tokens.

    A class without samples borrows: from the next larger one as it is, as an expert costs no more
    with fewer tokens; from the next smaller one in proportion to tokens, which is what it costs at
    most once arithmetic is the limit.
    """

    _classes: dict[int, MovingAverage] = field(default_factory=dict)  # by the most tokens

    @property
    def is_known(self) -> bool:
        """Whether there is any sample."""
        return bool(self._classes)

    def add(self, num_tokens: int, seconds: float) -> None:
        self._classes.setdefault(_class_of(num_tokens), MovingAverage()).add(seconds)

    def seconds(self, num_tokens: int) -> float:
        """What an expert with `num_tokens` takes; 0 where nothing is known."""
        wanted = _class_of(num_tokens)
        if wanted in self._classes:
            return self._classes[wanted].value
        smaller = [known for known in self._classes if known < wanted]
        if smaller:
            nearest = max(smaller)
            return self._classes[nearest].value * wanted / nearest
        larger = min(self._classes, default=None)
        return 0.0 if larger is None else self._classes[larger].value


@dataclass(slots=True)
class MissCosts:
    """Seconds of an expert's copy over the link, of its products here and there, of its read.

    The averages are of what was measured while everything else ran beside it, so the link's rate
    is its rate under load. Assumes that experts of all layers are of one size.
    """

    copy: MovingAverage = field(default_factory=MovingAverage)
    read: MovingAverage = field(default_factory=MovingAverage)
    device: TokenCost = field(default_factory=TokenCost)
    host: TokenCost = field(default_factory=TokenCost)


def _class_of(num_tokens: int) -> int:
    return 1 << max(0, num_tokens - 1).bit_length()
