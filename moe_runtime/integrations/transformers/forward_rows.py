"""Whose tokens a forward of a transformers model runs, read from its arguments.

B sequences of a batch, S new tokens of each.
"""

import inspect
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from moe_runtime.errors import UnsupportedModelError
from moe_runtime.predictors.predictor import StepRows
from moe_runtime.trace import Phase
from moe_runtime.trace_fields import Array


class SequenceNumbers:
    """Numbers the sequences of forwards; one that goes on with a cache goes on with its numbers."""

    def __init__(self) -> None:
        self._of_cache: WeakKeyDictionary[Any, Array] = WeakKeyDictionary()
        self._num_sequences = 0

    def rows(self, kwargs: Mapping[str, Any]) -> StepRows:
        """The rows of a forward with these arguments. Raises UnsupportedModelError."""
        token_id, num_past = inputs_of(kwargs)
        num_sequences, num_new = token_id.shape
        cache = kwargs.get("past_key_values")
        numbers = None if cache is None else self._of_cache.get(cache)
        if numbers is None or not num_past or len(numbers) != num_sequences:
            first = self._num_sequences
            self._num_sequences += num_sequences
            numbers = np.arange(first, first + num_sequences, dtype=np.int32)
        if cache is not None:
            self._of_cache[cache] = numbers
        position = positions_of(kwargs, num_sequences, num_new, num_past).reshape(-1)
        phase = Phase.DECODE if num_new == 1 and num_past else Phase.PREFILL
        return StepRows(
            token_id=token_id.reshape(-1),
            sequence_id=np.repeat(numbers, num_new),
            position=position,
            phase=np.where(position < 0, Phase.PADDING, phase).astype(np.uint8),
        )


def named_arguments(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Mapping[str, Any]:
    """The arguments of a call of `module`, all by name."""
    if not args:
        return kwargs
    return inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments


def inputs_of(kwargs: Mapping[str, Any]) -> tuple[Array, int]:
    """`[B, S]` int32, -1 where only embeddings are given; and how many tokens the cache holds."""
    tokens: torch.Tensor | None = kwargs.get("input_ids")
    inputs: torch.Tensor | None = kwargs.get("inputs_embeds") if tokens is None else tokens
    if inputs is None:
        raise UnsupportedModelError(
            "a forward had neither input_ids nor inputs_embeds, so its tokens cannot be told; "
            "record the module that generate() is called on"
        )
    cache = kwargs.get("past_key_values")
    num_past = 0 if cache is None else int(cache.get_seq_length())
    if tokens is None:
        return np.full(inputs.shape[:2], -1, np.int32), num_past
    token_id: Array = tokens.cpu().numpy().astype(np.int32)
    return token_id, num_past


def positions_of(
    kwargs: Mapping[str, Any], num_sequences: int, num_new: int, num_past: int
) -> Array:
    """`[B, S]`: where each new token stands among the tokens of its sequence that a mask shows."""
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        row = np.arange(num_past, num_past + num_new, dtype=np.int32)
        return np.tile(row, (num_sequences, 1))
    seen = mask.cpu().numpy() != 0
    # Some callers leave the past out of the mask: it is all seen then.
    before = num_past + num_new - seen.shape[1]
    counted = np.cumsum(seen, axis=1, dtype=np.int32)[:, -num_new:] - 1 + before
    return np.where(seen[:, -num_new:], counted, -1).astype(np.int32)
