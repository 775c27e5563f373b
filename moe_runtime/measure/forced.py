"""Logits along tokens that were written before, for comparing models that would write others."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from moe_runtime.measure.completion import Completion


@dataclass(frozen=True, slots=True, kw_only=True)
class ForcedLogits:
    """`logits` `[T, V]` float32 of the last T of `token_ids`, those behind the prompt."""

    token_ids: list[int]
    num_prompt_tokens: int
    logits: torch.Tensor


def forced_logits(
    model: PreTrainedModel, completions: Sequence[Completion], *, min_positions: int
) -> list[ForcedLogits]:
    """What `completions`, which kept their logits, give, and greedy text of `model` for the rest.

    The same prompts are written on from, each time a token shorter, until there are
    `min_positions`, or no prompt is left: then there are fewer.
    """
    found = []
    for completion in completions:
        assert completion.logits is not None
        found.append(
            ForcedLogits(
                token_ids=completion.prompt.token_ids + completion.token_ids,
                num_prompt_tokens=len(completion.prompt.token_ids),
                logits=completion.logits,
            )
        )
    # Whole texts first: their cut versions are much alike, but better than none.
    starts = [one.token_ids for one in found]
    starts.sort(key=len, reverse=True)
    context = model.config.get_text_config().max_position_embeddings
    for cut in range(max(map(len, starts), default=0)):
        for token_ids in starts:
            missing = min_positions - sum(len(one.logits) for one in found)
            if missing <= 0:
                return found
            # A context that is nearly full is cut in half, so that there is something to write.
            prompt = token_ids[: max(1, min(len(token_ids), context // 2)) - cut]
            if prompt:
                found.append(_write(model, prompt, min(missing, context - len(prompt))))
    return found


def _write(model: PreTrainedModel, prompt: list[int], num_tokens: int) -> ForcedLogits:
    """`num_tokens` greedy tokens, whatever the model says of the end."""
    inputs = torch.tensor([prompt], device=model.device)
    output: Any = model.generate(  # type: ignore[operator]
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        num_beams=1,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return ForcedLogits(
        token_ids=output.sequences[0].tolist(),
        num_prompt_tokens=len(prompt),
        logits=torch.cat(output.logits).float().cpu(),
    )
