"""Fits the weights of a reuse network to a trace.

T tokens, B places of the trace that are read side by side, L MoE layers, E experts a layer,
A averages, H hidden units.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from moe_runtime.predictors.predictor import Progress
from moe_runtime.predictors.reuse_history import (
    AS_INPUT,
    FIRST_AVERAGE,
    INPUT_SCALE,
    LEAST_AVERAGE,
    NUM_DIRECT,
    NUM_INPUTS,
    RATES,
)
from moe_runtime.trace_fields import Array

_HIDDEN = 128
_STEPS = 3_600
_BATCH = 256
_TOKENS_A_STEP = 2  # that each place moves on, in the mean: neighbours say nearly the same
_LEARNING_RATE = 3e-3
_WEIGHT_DECAY = 0.3  # of the weights between keys, which are many
_HORIZON_STEPS = 255  # uses further ahead count as further ahead, however far
_LATER_WEIGHT = 0.3  # of the loss of rates beside that of probabilities
LEAST_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What is known after layer `layer` of some tokens, and what comes."""

    layer: int
    inputs: Tensor  # [B, L, NUM_INPUTS, E]
    direct: Tensor  # [B, L, NUM_DIRECT, E]
    ahead: Tensor  # [B, L, E] visits of its layer, 0 the next one, until each key is used


class Reader:
    """Reads a trace from several places at once, and knows at each what a `ReuseHistory` would.

    Places are equally far apart, and go on from the start behind the end: after one round each has
    seen all tokens, and the trace is never unfolded in memory.
    """

    def __init__(self, topk: Array, num_experts: int, num_places: int) -> None:
        num_tokens, num_layers, self._top_k = topk.shape
        shape = num_layers, num_experts
        self._rank = torch.from_numpy(_ranks(topk, num_experts))  # [T, L, E]
        self._ahead = torch.from_numpy(_tokens_ahead(self._rank.numpy() > 0))
        self._token = torch.arange(num_places) * num_tokens // num_places
        self._averages = torch.full((num_places, num_layers, len(RATES), num_experts), 0.0)
        self._averages += FIRST_AVERAGE
        self._age = torch.full((num_places, *shape), 1 / FIRST_AVERAGE)
        self._before = torch.zeros(num_places, *shape)  # ranks in the token before
        self._earlier = torch.zeros(num_places, *shape)  # and in the one before that

    def move_on(self) -> None:
        """Each place hears of its token, and comes to the next."""
        rank = self._rank[self._token].float()
        everywhere = torch.ones(rank.shape[1], 1, dtype=torch.bool)
        self._averages, self._age = self._after(rank, everywhere)
        self._earlier, self._before = self._before, rank
        self._token = (self._token + 1) % len(self._rank)

    def sample(self, layer: int) -> Sample:
        """At each place, once layers up to `layer` have run for its token."""
        num_layers = self._rank.shape[1]
        is_now = (torch.arange(num_layers) <= layer)[:, None]  # known of this token
        rank = self._rank[self._token].float()
        averages, age = self._after(rank, is_now)
        now = torch.where(is_now, rank, self._before)
        used = (now > 0).float()
        used_before = (torch.where(is_now, self._before, self._earlier) > 0).float()
        scale = torch.tensor(INPUT_SCALE)[:, None]
        ranks = torch.stack([used, used_before, now / self._top_k], dim=2)
        inputs = torch.cat([ranks, scale * averages[:, :, list(AS_INPUT)]], dim=2)
        bounded = averages.clamp(LEAST_AVERAGE, 1.0 - LEAST_AVERAGE)
        others = torch.stack([used, used_before, torch.log1p(age), torch.ones_like(age)], dim=2)
        after = (self._token + 1) % len(self._rank)
        return Sample(
            layer=layer,
            inputs=inputs,
            direct=torch.cat([torch.log(bounded / (1.0 - bounded)), others], dim=2),
            ahead=torch.where(is_now, self._ahead[after], self._ahead[self._token]).float(),
        )

    def _after(self, rank: Tensor, is_now: Tensor) -> tuple[Tensor, Tensor]:
        """Averages and ages once the layers `is_now` `[L, 1]` have run for the token."""
        used = (rank > 0).float()
        # A layer of which a token says nothing stays as it was.
        is_heard = is_now & (used.sum(-1, keepdim=True) > 0)  # [B, L, 1]
        rates = torch.tensor(RATES)[:, None] * is_heard[..., None]  # [B, L, A, 1]
        averages = self._averages + rates * (used[:, :, None] - self._averages)
        return averages, torch.where(is_heard, (self._age + 1.0) * (1.0 - used), self._age)


class ReuseWeights(torch.nn.Module):
    """See `ReuseNetwork`; index 0 is of what this token has brought or will, 1 of the other."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        super().__init__()
        scale = (NUM_INPUTS * num_layers * num_experts) ** -0.5
        first = torch.randn(num_layers, NUM_INPUTS, num_experts, _HIDDEN) * scale
        self.input = torch.nn.Parameter(torch.stack([first, first]))
        self.input_bias = torch.nn.Parameter(torch.zeros(num_layers, _HIDDEN))
        first = torch.randn(num_layers, num_experts, 2, _HIDDEN) * 0.3 * _HIDDEN**-0.5
        self.output = torch.nn.Parameter(torch.stack([first, first]))
        self.output_bias = torch.nn.Parameter(torch.zeros(num_layers, num_experts, 2))
        direct = torch.zeros(num_layers, NUM_DIRECT, 2)
        direct[:, 2], direct[:, 3] = 0.6, 0.3  # log-odds of averages over 10 and 33 visits
        self.direct = torch.nn.Parameter(direct)

    def forward(self, sample: Sample) -> Tensor:
        """`[B, L, E, 2]` log-odds."""
        after = sample.layer + 1
        input_ = torch.cat([self.input[0, :after], self.input[1, after:]]).flatten(0, 2)
        output = torch.cat([self.output[1, :after], self.output[0, after:]])
        hidden = functional.relu(sample.inputs.flatten(1) @ input_ + self.input_bias[sample.layer])
        log_odds = (hidden @ output.flatten(0, 2).T).view(-1, *self.output_bias.shape)
        own = torch.einsum("blfe,lfo->bleo", sample.direct, self.direct)
        return log_odds + self.output_bias + own


def train_on_reuse(topk: Array, num_experts: int, on_progress: Progress) -> ReuseWeights:
    """`topk` `[T, L, K]` are the tokens of whole sequences, one after the other."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = ReuseWeights(topk.shape[1], num_experts)
        reader = Reader(topk, num_experts, min(_BATCH, len(topk) // _TOKENS_A_STEP))
        between_keys = [weights.input, weights.output]
        others = [weights.input_bias, weights.output_bias, weights.direct]
        groups: list[dict[str, Any]] = [
            {"params": between_keys},
            {"params": others, "weight_decay": 0.0},
        ]
        optimiser = torch.optim.AdamW(groups, lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
        plan: Any = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, _LEARNING_RATE, total_steps=_STEPS, pct_start=0.05
        )
        for step in range(_STEPS):
            for _ in range(int(torch.randint(1, 2 * _TOKENS_A_STEP, ()))):
                reader.move_on()
            # One layer for all places: then what is known of each comes in two blocks.
            sample = reader.sample(int(torch.randint(0, topk.shape[1], ())))
            loss = _loss(weights(sample), sample.ahead)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            plan.step()
            on_progress(step + 1, _STEPS)
    return weights


def _loss(log_odds: Tensor, ahead: Tensor) -> Tensor:
    soon, later = log_odds[..., 0], log_odds[..., 1]
    now = functional.binary_cross_entropy_with_logits(soon, (ahead == 0).float())
    # Geometric: unused at so many visits, then used, unless that is beyond the horizon.
    is_later = (ahead > 0).float()
    is_seen = (ahead < _HORIZON_STEPS).float()
    used = is_later * is_seen * functional.logsigmoid(later)
    unused = (ahead - 1).clamp(min=0) * functional.logsigmoid(-later)
    return now - _LATER_WEIGHT * (used + unused).mean()


def _ranks(topk: Array, num_experts: int) -> Array:
    """`[T, L, E]` uint8: 0 not used, and K for the largest weight down to 1."""
    num_tokens, num_layers, top_k = topk.shape
    found = np.zeros((num_tokens, num_layers, num_experts + 1), np.uint8)  # and what is missing
    ranks = np.broadcast_to(np.arange(top_k, 0, -1, dtype=np.uint8), topk.shape)
    np.put_along_axis(found, np.where(topk < 0, num_experts, topk).astype(np.int64), ranks, -1)
    return found[..., :-1]


def _tokens_ahead(used: Array) -> Array:
    """`[T, L, E]` uint8: in how many tokens, 0 this one, each key is used, or the horizon."""
    found = np.empty(used.shape, np.uint8)
    wait = np.full(used.shape[1:], _HORIZON_STEPS, np.int64)
    for token in range(len(used) - 1, -1, -1):
        wait = np.minimum(wait + 1, _HORIZON_STEPS)
        wait[used[token]] = 0
        found[token] = wait
    return found
