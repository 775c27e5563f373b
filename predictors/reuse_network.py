"""A small network that tells a cache when each expert is used again, from the routing so far.

B samples, L MoE layers, E experts a layer, P = L E keys, A averages, H hidden units.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from moe_runtime.errors import PredictorError
from moe_runtime.predictors.predictor import (
    Fingerprint,
    Forecast,
    ModelFacts,
    Progress,
    State,
    StepRows,
    silent,
)
from moe_runtime.predictors.reuse_history import NUM_DIRECT, NUM_INPUTS, ReuseHistory
from moe_runtime.trace import Phase, Trace
from moe_runtime.trace_fields import Array

_HIDDEN = 128
_MOST_TOKENS = 40_000  # the first of the trace; what is known after each is held
_STEPS = 800
_BATCH = 256
_LEARNING_RATE = 3e-3
_HORIZON_STEPS = 255  # uses further ahead count as further ahead, however far
_LATER_WEIGHT = 0.3  # of the loss of rates beside that of probabilities
_LEAST_TOKENS = 64
_TENSORS = ("input", "input_bias", "output", "output_bias", "direct")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReuseNetwork:
    """Log-odds `z = direct[l] f[l, e] + output relu(input x + layer l' + bias)` of two things.

    They are that the expert is used at the next visit of its layer, fitted by its cross-entropy;
    and, for one that is not, the rate at the visits after it, fitted by the likelihood of the
    number of visits until the use as a geometric one, so that 1 / rate is its mean. `x` holds, for
    all keys at once, the last two visits, ranks and moving averages; `f` a key's own averages,
    last visits and age; l' is the layer that ran last.
    """

    name: ClassVar[str] = "reuse_network"
    needs: ClassVar[frozenset[str]] = frozenset()

    fingerprint: Fingerprint
    input: Array  # [NUM_INPUTS, L, E, H] float32
    input_bias: Array  # [L, H], by the layer that ran last
    output: Array  # [H, 2 P]
    output_bias: Array  # [2 P]
    direct: Array  # [2, L, NUM_DIRECT]

    @classmethod
    def fit(cls, trace: Trace, facts: ModelFacts, on_progress: Progress = silent) -> Self:
        fingerprint = facts.fingerprint
        topk = trace.topk[trace.phase != Phase.PADDING]
        if len(topk) < _LEAST_TOKENS:
            raise PredictorError(
                f"the trace has {len(topk)} tokens, and {cls.name} learns from {_LEAST_TOKENS} or "
                "more; record more prompts"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = _Net(fingerprint.num_layers, trace.num_experts)
            _train(net, _Examples.of(topk, trace.num_experts), on_progress)
        tensors = {
            name: getattr(net, name).detach().numpy().astype(np.float32) for name in _TENSORS
        }
        return cls(fingerprint=fingerprint, **tensors)

    def start(self) -> "ReuseSession":
        return ReuseSession(self)

    def state(self) -> State:
        return State(settings={}, tensors={name: getattr(self, name) for name in _TENSORS})

    @classmethod
    def of_state(cls, fingerprint: Fingerprint, state: State) -> Self:
        tensors = {name: state.tensors[name] for name in _TENSORS}
        layers, experts = fingerprint.num_layers, fingerprint.num_experts
        hidden = tensors["output"].shape[0]
        shapes = {
            "input": (NUM_INPUTS, layers, experts, hidden),
            "input_bias": (layers, hidden),
            "output": (hidden, 2 * layers * experts),
            "output_bias": (2 * layers * experts,),
            "direct": (2, layers, NUM_DIRECT),
        }
        for name, shape in shapes.items():
            if tensors[name].shape != shape:
                raise ValueError(f"{name} is {tensors[name].shape} and must be {shape}")
        return cls(fingerprint=fingerprint, **tensors)


class ReuseSession:
    """Keeps each sequence's history; a new sequence starts from the last one that was heard.

    Rows of one sequence that run together share what is said after the last of them. In layers
    that have not run yet, `next_step` repeats what is said of this step.
    """

    def __init__(self, predictor: ReuseNetwork) -> None:
        self._of = predictor
        self._sequences: dict[int, _Running] = {}
        self._last: _Running | None = None
        self._rows: list[_Running] = []

    def begin(self, rows: StepRows) -> Forecast:
        self._rows = []
        for sequence, is_token in zip(
            rows.sequence_id.tolist(), rows.is_token.tolist(), strict=True
        ):
            found = self._sequences.get(sequence) if is_token else _Running(self._of)
            if found is None:
                found = _Running(self._of) if self._last is None else self._last.copy()
                self._sequences[sequence] = found
            if is_token:
                self._last = found
            self._rows.append(found)
        return self._said(0)

    def observe(self, layer: int, topk: Array, hidden: Array | None) -> Forecast:
        for running, chosen in zip(self._rows, topk, strict=True):
            running.visit(layer, chosen)
        return self._said(layer + 1)

    def forget(self, sequence_id: int) -> None:
        gone = self._sequences.pop(sequence_id, None)
        if gone is self._last:
            self._last = None

    def _said(self, first_layer: int) -> Forecast:
        said = np.stack([running.say() for running in self._rows])  # [T, 2, L, E]
        return Forecast(
            first_layer=first_layer,
            probability=said[:, 0, first_layer:],
            next_step=said[:, 0],
            later=said[:, 1],
        )


class _Running:
    """One sequence, with the sums that a visit changes in one layer's part only."""

    def __init__(self, of: ReuseNetwork) -> None:
        self._of = of
        self._history = ReuseHistory(of.fingerprint.num_layers, of.fingerprint.num_experts)
        inputs = self._history.inputs
        self._sum = np.einsum("ile,ileh->h", inputs, of.input)
        self._direct = np.einsum("lef,olf->ole", self._history.direct(), of.direct)
        self._layer = of.fingerprint.num_layers - 1
        self._answer: Array | None = None

    def copy(self) -> "_Running":
        found = _Running.__new__(_Running)
        found._of, found._history = self._of, self._history.copy()
        found._sum, found._direct = self._sum.copy(), self._direct.copy()
        found._layer, found._answer = self._layer, self._answer
        return found

    def visit(self, layer: int, chosen: Array) -> None:
        of, history = self._of, self._history
        before = history.inputs[:, layer].copy()
        history.visit(layer, chosen)
        change = (history.inputs[:, layer] - before).ravel()  # [NUM_INPUTS E]
        self._sum += change @ of.input[:, layer].reshape(len(change), -1)
        self._direct[:, layer] = np.einsum(
            "ef,of->oe", history.direct_of(layer), of.direct[:, layer]
        )
        self._layer = layer
        self._answer = None

    def say(self) -> Array:
        """`[2, L, E]`: probability at the next visit, rate after it."""
        if self._answer is None:
            of = self._of
            hidden = np.maximum(self._sum + of.input_bias[self._layer], 0.0)
            log_odds = (hidden @ of.output + of.output_bias).reshape(self._direct.shape)
            self._answer = 0.5 + 0.5 * np.tanh(0.5 * (log_odds + self._direct))
        answer: Array = self._answer
        return answer


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Examples:
    """Tokens of a trace with all that is known after each, for states between any two visits."""

    inputs: Tensor  # [N, NUM_INPUTS, L, E] float16
    direct: Tensor  # [N, L, E, NUM_DIRECT] float16
    ahead: Tensor  # [N, L, E] uint8: in how many tokens, 0 this one, a key is used

    @classmethod
    def of(cls, topk: Array, num_experts: int) -> Self:
        topk = topk[:_MOST_TOKENS]
        num_tokens, num_layers, _ = topk.shape
        shape = (num_layers, num_experts)
        history = ReuseHistory(*shape)
        inputs = np.empty((num_tokens, NUM_INPUTS, *shape), np.float16)
        direct = np.empty((num_tokens, *shape, NUM_DIRECT), np.float16)
        for token in range(num_tokens):
            history.visit_all(topk[token])
            inputs[token] = history.inputs
            direct[token] = history.direct()
        ahead = np.empty((num_tokens, *shape), np.uint8)
        wait = np.full(shape, _HORIZON_STEPS, np.int64)
        for token in range(num_tokens - 1, -1, -1):
            wait = np.minimum(wait + 1, _HORIZON_STEPS)
            wait[inputs[token, 0] > 0] = 0
            ahead[token] = wait
        return cls(
            inputs=torch.from_numpy(inputs),
            direct=torch.from_numpy(direct),
            ahead=torch.from_numpy(ahead),
        )

    def batch(self, size: int) -> tuple[Tensor, Tensor, int, Tensor]:
        """Inputs, direct features, the layer that ran last, and visits until each use."""
        num_tokens, num_layers = self.ahead.shape[:2]
        token = torch.randint(1, num_tokens - 1, (size,))
        # One layer for all samples: then what is known of each comes in two blocks.
        layer = int(torch.randint(0, num_layers, ()))

        def known(field: Tensor, offset: int, axis: int) -> Tensor:
            now, before = field[token + offset], field[token + offset - 1]
            parts = (
                now.narrow(axis, 0, layer + 1),
                before.narrow(axis, layer + 1, num_layers - layer - 1),
            )
            return torch.cat(parts, axis).float()

        return known(self.inputs, 0, 2), known(self.direct, 0, 1), layer, known(self.ahead, 1, 1)


class _Net(torch.nn.Module):
    def __init__(self, num_layers: int, num_experts: int) -> None:
        super().__init__()
        shape = (NUM_INPUTS, num_layers, num_experts, _HIDDEN)
        scale = (NUM_INPUTS * num_layers * num_experts) ** -0.5
        keys = num_layers * num_experts
        self.input = torch.nn.Parameter(torch.randn(shape) * scale)
        self.input_bias = torch.nn.Parameter(torch.zeros(num_layers, _HIDDEN))
        self.output = torch.nn.Parameter(torch.randn(_HIDDEN, 2 * keys) * 0.3 * _HIDDEN**-0.5)
        self.output_bias = torch.nn.Parameter(torch.zeros(2 * keys))
        direct = torch.zeros(2, num_layers, NUM_DIRECT)
        direct[:, :, 2], direct[:, :, 3] = 0.6, 0.3  # log-odds of averages over 10 and 33 visits
        self.direct = torch.nn.Parameter(direct)

    def forward(self, inputs: Tensor, direct: Tensor, layer: int) -> Tensor:
        """`[B, 2, L, E]` log-odds."""
        batch, _, num_layers, num_experts = inputs.shape
        weights = self.input.reshape(-1, self.input.shape[-1])
        hidden = functional.relu(inputs.reshape(batch, -1) @ weights + self.input_bias[layer])
        log_odds = hidden @ self.output + self.output_bias
        own = torch.einsum("blef,olf->bole", direct, self.direct)
        return log_odds.view(batch, 2, num_layers, num_experts) + own


def _train(net: _Net, examples: _Examples, on_progress: Progress) -> None:
    optimiser = torch.optim.Adam(net.parameters(), lr=_LEARNING_RATE)
    plan: Any = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, _LEARNING_RATE, total_steps=_STEPS, pct_start=0.05
    )
    for step in range(_STEPS):
        inputs, direct, layer, ahead = examples.batch(_BATCH)
        loss = _loss(net(inputs, direct, layer), ahead)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        plan.step()
        on_progress(step + 1, _STEPS)


def _loss(log_odds: Tensor, ahead: Tensor) -> Tensor:
    now = functional.binary_cross_entropy_with_logits(log_odds[:, 0], (ahead == 0).float())
    # Geometric: unused at so many visits, then used, unless that is beyond the horizon.
    is_later = (ahead > 0).float()
    is_seen = (ahead < _HORIZON_STEPS).float()
    used = is_later * is_seen * functional.logsigmoid(log_odds[:, 1])
    unused = (ahead - 1).clamp(min=0) * functional.logsigmoid(-log_odds[:, 1])
    return now - _LATER_WEIGHT * (used + unused).mean()
