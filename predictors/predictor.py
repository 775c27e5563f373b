"""What a predictor of routing is: what it is told, what it says, and what its numbers mean.

T rows (tokens of one forward), L MoE layers, K experts a token, E experts a layer, D model dim.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import numpy as np

from moe_runtime.expert import ExpertKey
from moe_runtime.trace import Phase, Trace
from moe_runtime.trace_fields import Array

__all__ = [
    "Fingerprint",
    "Forecast",
    "Foreteller",
    "Gate",
    "ModelFacts",
    "Predictor",
    "Progress",
    "Session",
    "State",
    "StepRows",
    "demand",
    "silent",
]


Progress = Callable[[int, int], None]


def silent(done: int, total: int) -> None:
    """Tells nobody."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """Which model a predictor belongs to. `checkpoint` is a digest of its weights, "" unknown.

    `layer_ids` says where its MoE layers stand among all `num_hidden_layers`; empty: one by one.
    """

    model: str
    num_layers: int
    num_experts: int
    top_k: int
    checkpoint: str = ""
    layer_ids: tuple[int, ...] = ()
    num_hidden_layers: int = 0

    @classmethod
    def of(cls, trace: Trace, checkpoint: str = "") -> Self:
        return cls(
            model=trace.model,
            num_layers=trace.num_layers,
            num_experts=trace.num_experts,
            top_k=trace.top_k,
            checkpoint=checkpoint,
            layer_ids=trace.layer_ids,
            num_hidden_layers=trace.num_hidden_layers,
        )

    def __str__(self) -> str:
        return (
            f"{self.model}, {self.num_layers} layers of {self.num_experts} experts, "
            f"top-{self.top_k}, checkpoint {self.checkpoint or 'unknown'}"
        )

    def fits(self, other: "Fingerprint") -> bool:
        """Whether both may be of one model: digests decide, and names where a digest is unknown."""
        sizes = (self.num_layers, self.num_experts, self.top_k)
        if sizes != (other.num_layers, other.num_experts, other.top_k):
            return False
        if self.checkpoint and other.checkpoint:
            return self.checkpoint == other.checkpoint
        return self.model == other.model or "unknown" in (self.model, other.model)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepRows:
    """What is known of a forward before its first layer runs, a row a token."""

    token_id: Array  # [T] int32; -1 unknown
    sequence_id: Array  # [T] int32
    position: Array  # [T] int32 within the sequence; -1 in padding rows
    phase: Array  # [T] uint8, a Phase

    @classmethod
    def of(cls, trace: Trace, rows: slice) -> Self:
        """Those of one step of a trace."""
        phase, token_id = trace.phase[rows], trace.token_id
        return cls(
            token_id=np.full(len(phase), -1, np.int32) if token_id is None else token_id[rows],
            sequence_id=trace.sequence_id[rows],
            position=trace.position[rows],
            phase=phase,
        )

    @classmethod
    def of_prompt(cls, sequence: int, ids: Sequence[int]) -> Self:
        """A prompt from its first token on, as one forward runs it."""
        return cls(
            token_id=np.asarray(ids, np.int32),
            sequence_id=np.full(len(ids), sequence, np.int32),
            position=np.arange(len(ids), dtype=np.int32),
            phase=np.full(len(ids), Phase.PREFILL, np.uint8),
        )

    def __len__(self) -> int:
        return len(self.token_id)

    @property
    def is_token(self) -> Array:
        """`[T]`: which rows are no padding."""
        is_token: Array = self.phase != Phase.PADDING
        return is_token


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Forecast:
    """Probabilities of future experts, as they are seen at one moment of a forward.

    `probability[t, r, e]` is the probability that expert `e` is among the top-k of row `t` in layer
    `first_layer + r` of the forward that runs; R, how many layers it covers, is the horizon, and
    may be 0. `next_step[t, l, e]` is the same for the next token of row `t`'s sequence, whose id is
    not known yet, in every layer; None where a predictor cannot tell. A later forecast of a forward
    replaces an earlier one in the layers that it covers, and leaves the others as they were.
    `later` is, for each layer, the rate of use in the visits after its next one, if that does not
    use it: 1 over the expected number of visits until one does. A cache cares; None: cannot tell.
    """

    first_layer: int
    probability: Array  # [T, R, E] float32
    next_step: Array | None = None  # [T, L, E] float32
    later: Array | None = None  # [T, L, E] float32


class Session(Protocol):
    """A predictor at work: it hears of each forward what is known, when it is known.

    For every forward `begin` comes first, then `observe` for layer 0, 1, ... L - 1. What a session
    has not been told cannot influence what it says: online use and a replay are the same calls.
    """

    def begin(self, rows: StepRows) -> Forecast:
        """Before the first layer runs. The forecast starts at layer 0."""

    def observe(self, layer: int, topk: Array, hidden: Array | None) -> Forecast:
        """Layer `layer` has routed the rows. The forecast starts at `layer + 1`.

        `topk` is `[T, K]`, -1 missing, largest weight first; `hidden` `[T, D]` is what the router
        saw, None where it is not at hand.
        """

    def forget(self, sequence_id: int) -> None:
        """The sequence has ended: drop what is remembered of it."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Gate:
    """How a layer's router turns its input into a choice, in numbers.

    Scores are `softmax` or `sigmoid` of `weight @ hidden + bias`; the choice is by score +
    `selection_bias`, within the `groups_used` best of `num_groups` groups of experts, a group being
    worth the sum of its two best (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
    """

    weight: Array  # [E, D] float32
    bias: Array  # [E] float32
    selection_bias: Array  # [E] float32
    is_sigmoid: bool
    num_groups: int = 1
    groups_used: int = 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelFacts:
    """What some predictors want to know of the model, beside a trace of it."""

    fingerprint: Fingerprint
    embedding: Array | None = None  # [V, D] float32, of the token ids
    gates: tuple[Gate, ...] = ()  # one a layer; empty: not known

    @classmethod
    def of(cls, trace: Trace) -> Self:
        """All that a trace tells by itself."""
        return cls(fingerprint=Fingerprint.of(trace))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class State:
    """A fitted predictor as it is stored: `settings` are JSON, `tensors` safetensors."""

    settings: Mapping[str, Any]
    tensors: Mapping[str, Array]


class Foreteller(Protocol):
    """What can say what is probable while a model runs, fitted or not."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]]  # fields of a trace beside topk, to work

    @property
    def fingerprint(self) -> Fingerprint:
        """Whose routing it foretells."""

    def start(self) -> Session:
        """A session that has seen no sequence yet; sessions share what was fitted, no state."""


class Predictor(Protocol):
    """A fitted predictor. It says what is probable and decides nothing."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]]  # fields of a trace beside topk, to be fitted and to work

    @property
    def fingerprint(self) -> Fingerprint:
        """Whose routing it was fitted to."""

    @classmethod
    def fit(cls, trace: Trace, facts: ModelFacts, on_progress: Progress = silent) -> Self:
        """Learn from all rows of `trace`. Raises PredictorError when a field is missing.

        Where it takes long, `on_progress` hears how much is done, and of how much.
        """

    def start(self) -> Session:
        """A session that has seen no sequence yet; sessions share what was fitted, no state."""

    def state(self) -> State:
        """What `of_state` makes an equal predictor of."""

    @classmethod
    def of_state(cls, fingerprint: Fingerprint, state: State) -> Self:
        """Raises KeyError or ValueError when `state` is not whole."""


def demand(probability: Array, first_layer: int = 0) -> dict[ExpertKey, float]:
    """Per expert the probability that any row wants it, 1 - prod(1 - p): what a cache is told.

    `probability` is `[T, R, E]`, of rows taken as independent. What is not a number counts as 0,
    and the rest is cut to [0, 1]: nothing else ever leaves here, whatever a predictor says.
    """
    clean = np.clip(np.nan_to_num(probability, nan=0.0, posinf=0.0, neginf=0.0), 0.0, 1.0)
    wanted = 1.0 - np.prod(1.0 - clean.astype(np.float64), axis=0)
    return {
        ExpertKey(first_layer + layer, expert): float(wanted[layer, expert])
        for layer, expert in np.ndindex(*wanted.shape)
    }
