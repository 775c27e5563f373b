"""The time of a message or a product as a start plus so much for each unit: alpha + beta n."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from scipy.optimize import nnls

from moe_runtime.config import Plausible

Seconds = Annotated[float, Plausible(0, 1000, "s")]


@dataclass(frozen=True, slots=True, kw_only=True)
class AlphaBeta:
    """`alpha_seconds + beta_seconds * n` (FSMoE, arXiv 2501.10714, section 4).

    `r_squared` is the share of the samples' variance that the line explains.
    """

    alpha_seconds: Seconds
    beta_seconds: Seconds  # for each unit of n
    r_squared: Annotated[float, Plausible(-1000, 1)]

    @classmethod
    def fit(cls, sizes: Sequence[float], seconds: Sequence[float]) -> "AlphaBeta":
        """By least squares of relative errors, neither below zero.

        Relative, as sizes go over decades: of plain errors the largest would decide alone, and the
        start, which rules small messages, would be whatever is left.
        """
        assert len(sizes) == len(seconds) > 1, (len(sizes), len(seconds))
        n, t = np.asarray(sizes, float), np.asarray(seconds, float)
        scale = n.max()  # so that both columns are of one size
        weight = 1 / np.maximum(t, np.finfo(float).tiny ** 0.5)
        columns = np.column_stack([np.ones_like(n), n / scale])
        (alpha, slope), _ = nnls(columns * weight[:, None], t * weight)
        residual = float(((alpha + slope * n / scale - t) ** 2).sum())
        variance = float(((t - t.mean()) ** 2).sum())
        r_squared = 1 - residual / variance if variance else 1.0
        return cls(
            alpha_seconds=float(alpha), beta_seconds=float(slope / scale), r_squared=r_squared
        )

    def seconds(self, n: float) -> float:
        """Of one message or product of size `n`."""
        return self.alpha_seconds + self.beta_seconds * n
