"""How many tokens a pass should hold, fitted from the passes so far."""

from dataclasses import dataclass

LEAST_TOKENS = 512  # below, a pass reads every expert for next to nothing
MOST_TOKENS = 4096  # above, activations take memory and no pass gets cheaper by the token


@dataclass(slots=True)
class PassSize:
    """MoE-Lens' n_real (arXiv 2504.09345, section 5): where computing takes as long as reading.

    Computing a pass of n tokens is taken to cost a + b n seconds, fitted by least squares, and
    reading its experts what it would at the fastest rate seen: assumes that reads hide behind
    computing, and that all passes read alike. Until two sizes of a pass are known, the most.
    """

    _count: int = 0
    _tokens: float = 0.0
    _seconds: float = 0.0
    _tokens_squared: float = 0.0
    _tokens_seconds: float = 0.0
    _bytes_per_second: float = 0.0
    _most_read_bytes: int = 0

    def add(
        self, num_tokens: int, computing_seconds: float, seconds: float, read_bytes: int
    ) -> None:
        """A pass took `seconds`, of which it did not wait for `computing_seconds`."""
        self._count += 1
        self._tokens += num_tokens
        self._seconds += computing_seconds
        self._tokens_squared += num_tokens**2
        self._tokens_seconds += num_tokens * computing_seconds
        self._bytes_per_second = max(self._bytes_per_second, read_bytes / seconds)
        self._most_read_bytes = max(self._most_read_bytes, read_bytes)

    def fit(self) -> tuple[float, float] | None:
        """(a, b) in seconds and seconds a token; None until two sizes of a pass are known."""
        spread = self._count * self._tokens_squared - self._tokens**2
        if self._count < 2 or spread <= 0:
            return None
        slope = (self._count * self._tokens_seconds - self._tokens * self._seconds) / spread
        return (self._seconds - slope * self._tokens) / self._count, slope

    @property
    def n_real(self) -> int | None:
        """Tokens from which computing takes longer than reading; None while it is not known."""
        fitted = self.fit()
        if fitted is None or fitted[1] <= 0 or not self._bytes_per_second:
            return None
        base, slope = fitted
        reading_seconds = self._most_read_bytes / self._bytes_per_second
        return max(0, round((reading_seconds - base) / slope))

    def limit(self) -> int:
        """Tokens that the next pass may hold."""
        n_real = self.n_real
        return MOST_TOKENS if n_real is None else min(max(n_real, LEAST_TOKENS), MOST_TOKENS)
