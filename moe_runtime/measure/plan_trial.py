"""Runs plans for a few real steps each, in turns, and says which one is fastest."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from moe_runtime.integrations.transformers.handle import handle
from moe_runtime.measure.plan_verdict import Trial

_PROMPT_TOKENS = 8
_NUM_TOKENS = 48
_WARM_SHARE = 1 / 3  # of the tokens, which fill the cache and are not counted
_LEAST_TOKENS = 6
# Before the middle one of the steps that count.
CONTEXT_TOKENS = round(_PROMPT_TOKENS + _NUM_TOKENS * (1 + _WARM_SHARE) / 2)
_SECONDS = 4.0  # a round of one plan; at least `_LEAST_TOKENS` are run
# By which a plan must beat the defaults, as medians of so few steps differ by as much by chance.
_LEAST_GAIN = 1.03

Load = Callable[..., PreTrainedModel]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Arguments of `load()`, and tokens a second that are expected where a plan chose them."""

    arguments: Mapping[str, Any]
    trial_tokens_per_second: float | None = None  # of the trial
    planned_tokens_per_second: float | None = None  # of what the user asked for


def run_trials(load: Load, candidates: Sequence[Candidate]) -> tuple[int, tuple[Trial, ...]]:
    """Which of `candidates` is fastest, and what each took; the first ones are the defaults.

    Each is loaded twice, forwards and then backwards, so that a machine that changes its mind does
    so for all. Tokens are sampled by the defaults once and forced on the others, so that all do the
    same work. A plan that is not clearly faster than the defaults in both rounds does not win:
    where other programs run, one round proves nothing.
    """
    tokens: list[int] = []
    medians: list[list[float]] = [[] for _ in candidates]
    order = [*range(len(candidates)), *reversed(range(len(candidates)))]
    for index in order:
        model = load(**candidates[index].arguments, warm_start=False)
        with closing(handle(model)):
            medians[index].append(_median_step_seconds(model, tokens))
        del model
    seconds = [min(found) for found in medians]
    trials = tuple(
        Trial(
            arguments=dict(one.arguments),
            planned_tokens_per_second=one.planned_tokens_per_second,
            predicted_tokens_per_second=one.trial_tokens_per_second,
            measured_tokens_per_second=1 / seconds[index],
            step_seconds=tuple(medians[index]),
        )
        for index, one in enumerate(candidates)
    )
    faster = [
        index
        for index, found in enumerate(medians)
        if all(default / own >= _LEAST_GAIN for default, own in zip(medians[0], found, strict=True))
    ]
    return min(faster, key=lambda index: seconds[index], default=0), trials


@torch.no_grad()
def _median_step_seconds(model: PreTrainedModel, tokens: list[int]) -> float:
    """Of decoding `tokens` one by one; where there are too few, the model's own are added."""
    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(config.vocab_size, (1, _PROMPT_TOKENS), generator=generator)
    output: Any = model(input_ids=prompt.to(model.device), use_cache=True)
    seconds: list[float] = []
    started = time.perf_counter()
    for step in range(_NUM_TOKENS):
        if step == len(tokens):
            chances = output.logits[0, -1].float().softmax(-1).cpu()
            tokens.append(int(torch.multinomial(chances, 1, generator=generator)))
        token = torch.tensor([[tokens[step]]], device=model.device)
        before = time.perf_counter()
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        int(output.logits[0, -1, 0])  # sync: the step is over when its logits are there
        seconds.append(time.perf_counter() - before)
        if step + 1 >= _LEAST_TOKENS and time.perf_counter() - started > _SECONDS:
            break
    return statistics.median(seconds[int(_WARM_SHARE * len(seconds)) :])
