"""In how many chunks a layer's messages and computing overlap best, by closed forms.

X transfers between ranks, Y within a node, E experts; r chunks.
"""

import math
from dataclasses import dataclass
from itertools import combinations


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One resource: each of r chunks takes `start_seconds + work_seconds / r`."""

    start_seconds: float
    work_seconds: float

    def chunk_seconds(self, degree: int) -> float:
        """Of one chunk."""
        return self.start_seconds + self.work_seconds / degree


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineCost:
    """The forward time of one layer in r chunks (FSMoE, arXiv 2501.10714, section 5.1).

    Its t_gar is 0, as inference reduces no gradients. X is dispatch and combine together, its
    2 t_a2a; Y gather and scatter within a node, its t_ag + t_rs, zero where there are none. The
    slowest resource runs without a pause, and the others only fill it and empty it:

        f2 = X + Y + r E    computing is the slowest
        f3 = r X + Y        transfers between ranks
        f4 = X + r Y        transfers within nodes

    with X, Y and E of one chunk. Its predicates Q1 to Q3 pick the largest of them. Assumes balanced
    routing, equal chunks, and that all chunks are dispatched before the first is combined.
    """

    transfer: Stage
    within_node: Stage
    experts: Stage

    def seconds(self, degree: int) -> float:
        """Of the layer in so many chunks."""
        return max(c + a / degree + b * degree for a, b, c in self._forms())

    def best_degree(self, most: int) -> int:
        """The `r` from 1 to `most` with the fewest seconds, the smallest of equals.

        Each form is a / r + b r + c, smallest at sqrt(a / b). Their maximum is convex, so it is
        smallest where one of them is, or where two of them cross: where
        (b - b') r^2 + (c - c') r + (a - a') = 0. The whole numbers beside these are looked at.
        """
        forms = self._forms()
        found = {1.0, float(most)}
        found |= {math.sqrt(a / b) for a, b, _ in forms if b > 0}
        for (a, b, c), (other_a, other_b, other_c) in combinations(forms, 2):
            found |= set(_roots(b - other_b, c - other_c, a - other_a))
        whole = {r for x in found for r in (math.floor(x), math.ceil(x)) if 1 <= r <= most}
        return min(sorted(whole), key=self.seconds)

    def _forms(self) -> tuple[tuple[float, float, float], ...]:
        """(a, b, c) of f2, f3 and f4."""
        x, y, e = self.transfer, self.within_node, self.experts
        starts = x.start_seconds, y.start_seconds, e.start_seconds
        works = x.work_seconds, y.work_seconds, e.work_seconds
        return (
            (works[0] + works[1], starts[2], starts[0] + starts[1] + works[2]),
            (works[1], starts[0], works[0] + starts[1]),
            (works[0], starts[1], starts[0] + works[1]),
        )


def _roots(square: float, linear: float, constant: float) -> list[float]:
    if square == 0:
        return [] if linear == 0 else [-constant / linear]
    discriminant = linear * linear - 4 * square * constant
    if discriminant < 0:
        return []
    spread = math.sqrt(discriminant)
    return [(-linear - spread) / (2 * square), (-linear + spread) / (2 * square)]
