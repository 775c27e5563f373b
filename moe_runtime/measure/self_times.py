"""Time of nested stretches, each without what is nested in it."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

Stretch = tuple[str, float, float]  # name, from when, to when


@dataclass(slots=True)
class SelfTime:
    """Of all stretches of one name. `seconds` are those in nothing nested."""

    num: int = 0
    seconds: float = 0.0


def self_times(stretches: Iterable[Stretch]) -> dict[str, SelfTime]:
    """By name, for stretches of one thread: of two that overlap, the later begun is inside.

    It counts only as far as the other one goes, so that nothing is counted twice.
    """
    found: defaultdict[str, SelfTime] = defaultdict(SelfTime)
    around: list[tuple[str, float]] = []  # name and end of those that are open
    for name, begin, end in sorted(stretches, key=lambda each: (each[1], -each[2])):
        while around and around[-1][1] <= begin:
            around.pop()
        if around:
            end = min(end, around[-1][1])
            found[around[-1][0]].seconds -= end - begin
        found[name].num += 1
        found[name].seconds += end - begin
        around.append((name, end))
    return dict(found)
