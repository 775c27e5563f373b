"""What a pass would take if its sequences ran as two groups that take turns."""

import math
from dataclasses import dataclass

_LIKE_SHARE = 0.125  # passes whose tokens and keys differ by less are of one size


@dataclass(frozen=True, slots=True, kw_only=True)
class PassTimes:
    """What one pass took; attention and waiting for reads are parts of `seconds`, or beside it."""

    num_groups: int
    num_tokens: int
    num_keys: int
    seconds: float
    attention_seconds: float
    stall_seconds: float

    @property
    def token_seconds(self) -> float:
        return self.seconds / self.num_tokens

    @property
    def products_seconds(self) -> float:
        """Of a pass in one group: neither attention nor waiting."""
        return max(0.0, self.seconds - self.attention_seconds - self.stall_seconds)

    def is_like(self, other: "PassTimes") -> bool:
        """Whether seconds a token of both can be compared."""
        return _is_like(self.num_tokens, other.num_tokens) and _is_like(
            self.num_keys, other.num_keys
        )


def _is_like(a: int, b: int) -> bool:
    return abs(a - b) <= _LIKE_SHARE * max(a, b)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupModel:
    """What a pass would take in two groups, from what one took: on `num_threads`, for `num_layers`.

    With A seconds of attention, P of products and W of waiting for reads, n threads and a of them
    for attention, one group of L layers takes A + P + W, and two

        max(A', P', P + W) + min(A', P') / (2 L)     A' = A sqrt(n / a)
                                                     P' = P sqrt(n / (n - a))

    The last term is for both ends of a pass, where one group is alone. Assumes that both parts,
    which wait for memory too, lose less than their threads: the square root is the best that was
    measured for one of two, and it can be their number; that reads go on under either; and that a
    turn costs nothing. So it is what may be gained, and says where to try. A single thread has
    A + P to do whatever the groups.
    """

    num_threads: int
    num_layers: int

    def seconds(self, times: PassTimes, num_attention: int) -> float:
        """In two groups, `num_attention` threads attending."""
        attention_seconds, products_seconds = times.attention_seconds, times.products_seconds
        reading_seconds = products_seconds + times.stall_seconds
        if self.num_threads == 1:
            return max(attention_seconds + products_seconds, reading_seconds)
        num_products = self.num_threads - num_attention
        attention_seconds *= math.sqrt(self.num_threads / num_attention)
        products_seconds *= math.sqrt(self.num_threads / num_products)
        ends_seconds = min(attention_seconds, products_seconds) / (2 * self.num_layers)
        return max(attention_seconds, products_seconds, reading_seconds) + ends_seconds

    def attention_threads(self, times: PassTimes) -> int:
        """The threads that attend while the others multiply: those that take the least time."""
        return min(range(1, max(2, self.num_threads)), key=lambda a: self.seconds(times, a))

    def gain(self, times: PassTimes) -> float:
        """The share of its time that a pass in one group would save in two."""
        return 1.0 - self.seconds(times, self.attention_threads(times)) / times.seconds
