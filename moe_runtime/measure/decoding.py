"""How the next token is chosen, and when to stop."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """Settings of `generate()`. Greedy at temperature 0.

    `seed` seeds the first prompt; prompt `i` uses `seed + i`, so that each prompt's result does not
    depend on the ones before it.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float | None = None
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens ({self.max_new_tokens}) must be at least 1")
        if self.temperature < 0:
            raise ValueError(f"temperature ({self.temperature}) must not be negative; 0 is greedy")
        if self.top_p is not None:
            if not 0 < self.top_p <= 1:
                raise ValueError(f"top_p ({self.top_p}) must be above 0 and at most 1")
            if self.temperature == 0:
                raise ValueError(
                    f"top_p ({self.top_p}) has no effect on greedy decoding; "
                    "set a temperature above 0"
                )
        if any(not text for text in self.stop):
            raise ValueError("a stop string is empty; leave it out")

    def generate_arguments(self) -> dict[str, Any]:
        """Keyword arguments of transformers' `generate()`, but for the number of tokens."""
        arguments: dict[str, Any] = {"do_sample": self.temperature > 0, "num_beams": 1}
        if self.temperature > 0:
            arguments["temperature"] = self.temperature
            if self.top_p is not None:
                arguments["top_p"] = self.top_p
        if self.stop:
            arguments["stop_strings"] = list(self.stop)
        return arguments
