"""Fits a path network to the sequences of a trace.

B sequences of a batch, S tokens of the longest, L MoE layers, E experts a layer.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from moe_runtime.predictors.counts import membership, tokens_of
from moe_runtime.predictors.path_network import PathNetwork, PathSettings
from moe_runtime.predictors.predictor import ModelFacts, Progress
from moe_runtime.trace import Trace
from moe_runtime.trace_fields import Array

_TOKENS = 1_500_000  # to learn from, each as often as it takes
_BATCH_SEQUENCES = 8
_MAX_LENGTH = 512
_LEARNING_RATE = 3e-3
_WARM_UP = 0.1
_MAX_GRADIENT = 0.8
_PROMPT_SHARES = (0.2, 0.9)  # of a sequence that the encoder is given: every place becomes a prompt
_HARD_SHARE = 0.75  # Read-ME's weight of the first choice's cross-entropy; the rest is soft
_SMOOTHING = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """Sequences padded on the right, and of how many tokens each one's prompt is."""

    token_id: Tensor  # [B, S]
    length: Tensor  # [B]
    num_prompt: Tensor  # [B]; 0 without an encoder
    truth: Tensor  # [B, S, L, E]: 1 where chosen, or the router's shares; all 0 where missing


def train_on_paths(
    settings: PathSettings,
    trace: Trace,
    facts: ModelFacts,
    shares: Array,
    on_progress: Progress,
) -> PathNetwork:
    """A network of `settings`, trained on whole sequences, cut to their first tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = PathNetwork(settings)
        network.start_at(shares)
        if facts.embedding is not None:
            network.embedding.start_from(facts.embedding)
        sequences = _sequences(trace)
        num_tokens = sum(len(rows) for rows in sequences)
        epochs = max(2, min(20, round(_TOKENS / num_tokens)))
        num_batches = -(-len(sequences) // _BATCH_SEQUENCES)
        optimiser = torch.optim.AdamW(network.parameters(), lr=_LEARNING_RATE, weight_decay=0.05)
        plan = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, _LEARNING_RATE, total_steps=epochs * num_batches, pct_start=_WARM_UP
        )
        done = 0
        for _ in range(epochs):
            for batch in _batches(trace, sequences, settings):
                loss = _loss(network, batch)
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(network.parameters(), _MAX_GRADIENT)
                optimiser.step()
                plan.step()
                done += 1
                on_progress(done, epochs * num_batches)
        network.requires_grad_(False)
        if settings.is_softmax:
            _fit_chance(network, trace, sequences)
    return network.eval()


def _sequences(trace: Trace) -> list[Array]:
    rows = tokens_of(trace)
    starts = np.flatnonzero(np.diff(trace.sequence_id[rows], prepend=-1))
    return [part[:_MAX_LENGTH] for part in np.split(rows, starts[1:])]


def _batches(trace: Trace, sequences: list[Array], settings: PathSettings) -> Iterator[_Batch]:
    order = torch.randperm(len(sequences)).tolist()
    for start in range(0, len(order), _BATCH_SEQUENCES):
        yield _batch(
            trace, [sequences[i] for i in order[start : start + _BATCH_SEQUENCES]], settings
        )


def _batch(trace: Trace, sequences: list[Array], settings: PathSettings) -> _Batch:
    assert trace.token_id is not None
    length = torch.tensor([len(rows) for rows in sequences])
    longest = int(length.max())
    rows = np.stack([np.pad(rows, (0, longest - len(rows)), mode="edge") for rows in sequences])
    truth = _truth(trace, rows, is_soft=settings.is_softmax)
    truth[np.arange(longest) >= length.numpy()[:, None]] = 0
    low, high = _PROMPT_SHARES
    share = low + (high - low) * torch.rand(len(sequences))
    num_prompt = (share * length).ceil().long() if settings.num_encoder_blocks else length * 0
    return _Batch(
        token_id=torch.from_numpy(trace.token_id[rows].astype(np.int64)),
        length=length,
        num_prompt=num_prompt,
        truth=torch.from_numpy(truth),
    )


def _truth(trace: Trace, rows: Array, *, is_soft: bool) -> Array:
    """`[B, S, L, E]`: who was chosen; for `is_soft` the gate's own distribution."""
    if not is_soft:
        return membership(trace.topk[rows], trace.num_experts)
    if trace.gate_probs is not None:
        shares: Array = trace.gate_probs[rows].astype(np.float32)
    elif trace.weights is not None:
        topk = trace.topk[rows].astype(np.int64)
        shares = np.zeros((*topk.shape[:-1], trace.num_experts + 1), np.float32)
        np.put_along_axis(shares, topk, trace.weights[rows].astype(np.float32), axis=-1)
        shares = np.maximum(shares[..., :-1], 0)
    else:
        shares = membership(trace.topk[rows], trace.num_experts)
    shares /= np.maximum(shares.sum(-1, keepdims=True), 1e-9)
    return shares


def _loss(network: PathNetwork, batch: _Batch) -> Tensor:
    logits, truth = _both_parts(network, batch) if network.encoder else _decoded(network, batch)
    is_known = truth.sum(-1) > 0  # [.., L]
    logits, truth = logits[is_known], truth[is_known]
    if not network.settings.is_softmax:
        return functional.binary_cross_entropy_with_logits(logits, truth)
    hard = functional.cross_entropy(logits, truth.argmax(-1), label_smoothing=_SMOOTHING)
    soft = -(truth * logits.log_softmax(-1)).sum(-1).mean()
    return _HARD_SHARE * hard + (1 - _HARD_SHARE) * soft


def _decoded(network: PathNetwork, batch: _Batch) -> tuple[Tensor, Tensor]:
    states, _ = network.decode(batch.token_id, 0, (), ())
    return network.logits(states), batch.truth


def _both_parts(network: PathNetwork, batch: _Batch) -> tuple[Tensor, Tensor]:
    """Logits and truth of the prompts, from the encoder, and of the tokens after them."""
    place = torch.arange(batch.token_id.shape[1])
    num_prompt = batch.num_prompt[:, None]
    widest = int(batch.num_prompt.max())
    in_prompt = (place < num_prompt)[:, :widest]
    states = network.encode(batch.token_id[:, :widest], in_prompt[:, None, None])
    memory_mask = functional.pad(in_prompt, (1, 0), value=True)[:, None, None]
    num_after = int((batch.length - batch.num_prompt).max())
    where = (num_prompt + torch.arange(max(num_after, 1))).clamp(max=len(place) - 1)
    tokens = batch.token_id.gather(1, where)
    after, _ = network.decode(tokens, num_prompt, (), network.memory(states), memory_mask)
    is_after = (num_prompt + torch.arange(where.shape[1])) < batch.length[:, None]
    batch_index = torch.arange(len(where))[:, None]
    truth = torch.cat(
        [batch.truth[:, :widest][in_prompt], batch.truth[batch_index, where][is_after]]
    )
    return network.logits(torch.cat([states[in_prompt], after[is_after]])), truth


def _fit_chance(network: PathNetwork, trace: Trace, sequences: list[Array]) -> None:
    """From shares of one choice to probabilities of being among K: a logistic curve a layer."""
    settings = network.settings
    inputs, labels = [], []
    with torch.inference_mode():
        for rows in sequences[:: max(1, len(sequences) // 64)]:
            batch = _batch(trace, [rows], settings)
            states, _ = network.decode(batch.token_id, 0, (), ())
            inputs.append(network.logits(states)[0].log_softmax(-1))
            labels.append(torch.from_numpy(membership(trace.topk[rows], trace.num_experts)))
    said, truth = torch.cat(inputs).clone(), torch.cat(labels)
    curve = [network.sharpness.requires_grad_(True), network.shift.requires_grad_(True)]
    optimiser = torch.optim.LBFGS(curve, max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        logits = said * network.sharpness + network.shift
        loss = functional.binary_cross_entropy_with_logits(logits, truth)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    network.requires_grad_(False)
