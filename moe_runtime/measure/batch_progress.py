"""How much of a batch is left, if every line writes all that it may."""

from moe_runtime.measure.batch_lines import BatchLine, BatchLines


class BatchProgress:
    """Counts tokens of lines that have finished, run, or are still to come."""

    def __init__(self, lines: BatchLines) -> None:
        self._lines = lines
        self._finished_tokens = 0
        self._left_tokens = sum(line.sequence.max_new_tokens for line in lines.lines.values())

    def finish(self, line: BatchLine) -> None:
        """`line` wants no more tokens."""
        self._left_tokens -= line.sequence.max_new_tokens
        self._finished_tokens += len(line.sequence.written)

    def eta_seconds(self, seconds: float) -> float:
        """Seconds that are left, at the pace of the `seconds` so far."""
        running = sum(
            len(line.sequence.written)
            for line in self._lines.lines.values()
            if not line.finish_reason
        )
        return seconds * (self._left_tokens - running) / (self._finished_tokens + running)
