"""A line while it runs: its tokens so far."""

from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """`prompt_ids` and what was written behind them, up to `max_new_tokens`."""

    number: int
    prompt_ids: list[int]
    max_new_tokens: int
    written: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.written)

    @property
    def most_tokens(self) -> int:
        """Tokens that are stored at most: the last one written is never fed back."""
        return len(self.prompt_ids) + self.max_new_tokens - 1

    @property
    def token_ids(self) -> list[int]:
        return self.prompt_ids + self.written
