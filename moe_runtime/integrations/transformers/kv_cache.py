"""How much a model's attention cache grows, seen by running the model on the meta device."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from moe_runtime.integrations.transformers.survey import Survey

# Long enough for caches that compress a few tokens into one.
_SHORT_TOKENS, _LONG_TOKENS = 16, 32


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCache:
    """Bytes that one sequence takes in transformers' own cache."""

    bytes_per_token: int  # all layers, while windows are not full
    window_bytes_per_token: int  # the part of it in sliding layers, which stop growing
    windows: tuple[int, ...]  # tokens that sliding layers keep
    state_bytes: int  # held once, whatever the length (linear attention, convolutions)


def measure_kv_cache(survey: Survey) -> KVCache | None:
    """Run the meta model of `survey` twice and look at what it cached; None if it cannot run there.

    Nothing is computed on the meta device. Experts are stood in for, as which rows they get depends
    on numbers.
    """
    try:
        with _experts_stood_in_for(survey):
            short = _cached_layers(survey.model, _SHORT_TOKENS)
            long = _cached_layers(survey.model, _LONG_TOKENS)
    except Exception:  # a model that needs numbers (NotImplementedError and many more)
        return None
    grown = [_bytes_per_token(a, b) for a, b in zip(short, long, strict=True)]
    sliding = [
        (growth, int(layer.sliding_window))
        for growth, layer in zip(grown, long, strict=True)
        if _is_sliding(layer)
    ]
    return KVCache(
        bytes_per_token=sum(grown),
        window_bytes_per_token=sum(growth for growth, _ in sliding),
        windows=tuple(sorted({window for _, window in sliding})),
        state_bytes=sum(map(_state_bytes, long)),
    )


@contextmanager
def _experts_stood_in_for(survey: Survey) -> Iterator[None]:
    """Each experts module returns something of the right shape while this is entered."""
    modules = [site.module for site in survey.sites if site.is_fused]
    try:
        for module in modules:
            module.__dict__["forward"] = lambda hidden, *_, **__: torch.empty_like(hidden)
        yield
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)


@torch.no_grad()
def _cached_layers(model: PreTrainedModel, num_tokens: int) -> list[Any]:
    """The layers of transformers' cache after one forward of `num_tokens`."""
    token_ids = torch.zeros(1, num_tokens, dtype=torch.long, device="meta")
    output = model(input_ids=token_ids, use_cache=True)
    return list(output.past_key_values.layers)


def _is_sliding(layer: Any) -> bool:
    return bool(getattr(layer, "is_sliding", False))


def _bytes_per_token(short: Any, long: Any) -> int:
    """How much one layer grows; a window may be full already, so its bytes are shared out."""
    if _is_sliding(long):
        return _bytes((long.keys, long.values)) // int(long.keys.shape[-2])
    growth = _bytes(vars(long).values()) - _bytes(vars(short).values())
    return growth // (_LONG_TOKENS - _SHORT_TOKENS)


def _state_bytes(layer: Any) -> int:
    """States of linear attention and convolutions stand in dicts beside keys and values."""
    held = [value for value in vars(layer).values() if isinstance(value, dict)]
    return sum(_bytes(states.values()) for states in held)


def _bytes(values: Iterable[object]) -> int:
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
