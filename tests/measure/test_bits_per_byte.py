"""Bits per byte: every token counts once, with the text before it."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_runtime.measure.bits_per_byte import bits_per_byte

VOCABULARY = 8


class Guesser:
    """Knows the next token of 0, 1, 2 ... modulo the vocabulary, with a given certainty."""

    def __init__(self, certainty: float) -> None:
        self.certainty = certainty
        self.longest = 0

    def __call__(self, ids: torch.Tensor, *, use_cache: bool) -> Any:
        self.longest = max(self.longest, ids.shape[1])
        rest = (1 - self.certainty) / (VOCABULARY - 1)
        share = torch.full((*ids.shape, VOCABULARY), rest)
        share.scatter_(2, ((ids + 1) % VOCABULARY)[..., None], self.certainty)
        return SimpleNamespace(logits=share.log())


@pytest.mark.parametrize("length", [6, 14, 22, 30, 62])
@pytest.mark.parametrize("context_tokens", [4, 10, 64])
def test_every_token_costs_its_own_bits_once(length: int, context_tokens: int) -> None:
    """Law: a count of 0 to `length` between ends 7: all but nothing is as expected."""
    document = [token % VOCABULARY for token in range(length + 1)]
    assert document[-1] == 6  # so that the end is the next
    model = Guesser(0.5)
    found = bits_per_byte(
        model,  # type: ignore[arg-type]
        [document, document],
        num_bytes=10,
        context_tokens=context_tokens,
        end_token=7,
    )
    assert found == pytest.approx(2 * (length + 2) * -math.log2(0.5) / 10)
    assert model.longest <= context_tokens
