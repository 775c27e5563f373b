"""The experts of a layer whose weights are all in memory."""

from collections.abc import Sequence

from moe_runtime.engine import Weights


class InMemory:
    """Experts that are simply there, as `ExpertAccess` wants them."""

    def __init__(self, weights: Sequence[Weights]) -> None:
        self._weights = weights
        self.max_together = len(weights)

    def is_ready(self, expert: int) -> bool:
        return True

    def weights(self, expert: int) -> Weights:
        return self._weights[expert]

    def release(self, expert: int) -> None:
        """Nothing to free."""
