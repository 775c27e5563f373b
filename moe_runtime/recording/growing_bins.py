"""Sums over equal stretches of an axis whose length nobody knows beforehand."""

import numpy as np

from moe_runtime.trace_fields import Array


class GrowingBins:
    """Rows of `num_bins` sums. Memory is fixed: beyond the last bin, bins become twice as wide.

    Sums are float64, so whole numbers stay exact up to 2^53, whatever is merged.
    """

    def __init__(self, num_rows: int, *, num_bins: int, width: float) -> None:
        assert num_bins > 1, num_bins
        assert width > 0.0, width
        self.width = width
        self._sums = np.zeros((num_rows, num_bins))
        self._num_used = 0

    @property
    def sums(self) -> Array:
        """`[rows, bins]` up to the last bin that something was added to."""
        return self._sums[:, : self._num_used]

    def add(self, row: int, position: float, amount: float) -> None:
        """Add `amount` to the bin that `position` (0 or more) lies in."""
        found = self._bin(position)  # first, as it may put new sums in the place of these
        self._sums[row, found] += amount

    def add_spans(self, rows: Array, begins: Array, ends: Array) -> None:
        """Of each span from `begins[i]` to `ends[i]`, add to each bin of `rows[i]` what lies in it.

        All at once, as one after the other takes as long as a layer of a small model.
        """
        if not len(rows):
            return
        self._bin(float(ends.max()))
        first, last = (begins / self.width).astype(int), (ends / self.width).astype(int)
        is_one = first == last
        np.add.at(self._sums, (rows[is_one], first[is_one]), (ends - begins)[is_one])
        for index in np.flatnonzero(~is_one):
            row, start, stop = rows[index], first[index], last[index]
            self._sums[row, start] += (start + 1) * self.width - begins[index]
            self._sums[row, start + 1 : stop] += self.width
            self._sums[row, stop] += ends[index] - stop * self.width

    def _bin(self, position: float) -> int:
        num_bins = self._sums.shape[1]
        while position >= num_bins * self.width:
            self._merge()
        found = int(position / self.width)
        self._num_used = max(self._num_used, found + 1)
        return found

    def _merge(self) -> None:
        """Each bin takes its right neighbour in."""
        padded = np.pad(self._sums, ((0, 0), (0, self._sums.shape[1] % 2)))
        merged = padded.reshape(len(padded), -1, 2).sum(axis=2)
        self._sums = np.zeros_like(self._sums)
        self._sums[:, : merged.shape[1]] = merged
        self.width *= 2
        self._num_used = (self._num_used + 1) // 2
