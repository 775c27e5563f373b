"""How many bits a language model needs for a byte of given texts: its quality."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch.nn import functional
from transformers import PreTrainedModel

_IGNORED = -100


@torch.no_grad()
def bits_per_byte(
    model: PreTrainedModel,
    documents: Sequence[Sequence[int]],
    *,
    num_bytes: int,
    context_tokens: int,
    end_token: int,
) -> float:
    """Over tokenised `documents` of `num_bytes` in all, each by itself and its end counted too.

    Every token is counted once, with all before it in the first window of `context_tokens` and
    with at least half a window later. Logits count as the model gives them.
    """
    nats = 0.0
    for document in documents:
        for inputs_T, targets_T in _windows([end_token, *document, end_token], context_tokens):
            logits_TV = model(inputs_T[None], use_cache=False).logits[0]
            loss = functional.cross_entropy(
                logits_TV.float(), targets_T, ignore_index=_IGNORED, reduction="sum"
            )
            nats += float(loss)
    return nats / math.log(2) / num_bytes


def _windows(
    tokens: Sequence[int], context_tokens: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and targets; those that an earlier window counted are ignored."""
    known = 1
    half = context_tokens // 2
    for start in range(0, max(len(tokens) - 1 - half, 1), half):
        piece = torch.tensor(tokens[start : start + context_tokens + 1])
        targets_T = piece[1:].clone()
        targets_T[: known - start - 1] = _IGNORED
        known = start + len(piece)
        yield piece[:-1], targets_T
