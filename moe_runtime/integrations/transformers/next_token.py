"""Chooses the next token of each sequence, whoever it shares a batch with."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Greedy at temperature 0. Sequence `i` draws with `seed + i`, so that batches change nothing.

    Raises ValueError for what cannot be.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature ({self.temperature}) must not be negative; 0 is greedy")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise ValueError(
                f"top_k ({self.top_k}) and top_p ({self.top_p}) have no effect on greedy decoding; "
                "set a temperature above 0"
            )

    def warpers(self) -> LogitsProcessorList:
        """Those that transformers' `generate()` would use, in its order."""
        found = LogitsProcessorList()
        if self.temperature not in (0.0, 1.0):
            found.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k is not None:
            found.append(TopKLogitsWarper(self.top_k))
        if self.top_p is not None:
            found.append(TopPLogitsWarper(self.top_p))
        return found


@dataclass(slots=True)
class TokenChooser:
    """Draws tokens; each sequence has random numbers of its own."""

    sampling: Sampling
    _warpers: LogitsProcessorList = field(init=False)
    _generators: dict[int, torch.Generator] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._warpers = self.sampling.warpers()

    def choose(self, logits_NV: torch.Tensor, sequences: list[int]) -> list[int]:
        """A token for each of `sequences`, row by row."""
        if self.sampling.temperature == 0:
            return logits_NV.argmax(-1).tolist()
        no_ids = torch.LongTensor()  # these warpers look at the scores alone
        scores_NV = self._warpers(no_ids, logits_NV.float().cpu())
        return [
            int(torch.multinomial(row_V, 1, generator=self._generator(sequence)))
            for row_V, sequence in zip(scores_NV.softmax(-1), sequences, strict=True)
        ]

    def _generator(self, sequence: int) -> torch.Generator:
        if sequence not in self._generators:
            seeded = torch.Generator().manual_seed(self.sampling.seed + sequence)
            self._generators[sequence] = seeded
        return self._generators[sequence]


# What a model's generation config may ask of generate() beside sampling, and what asks for nothing.
_PROCESSORS = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "guidance_scale": 1.0,
}


def unused_settings(model: PreTrainedModel) -> list[str]:
    """Settings of the model's generation config that change scores, and that nobody here heeds."""
    config = model.generation_config
    given = ((name, getattr(config, name, None)) for name in _PROCESSORS)
    return [f"{name}={value}" for name, value in given if value not in (None, _PROCESSORS[name])]


def end_ids(model: PreTrainedModel) -> frozenset[int]:
    """Tokens with which the model says that it has finished."""
    end: Any = getattr(model.generation_config, "eos_token_id", None)
    return frozenset(end if isinstance(end, list) else [] if end is None else [end])
