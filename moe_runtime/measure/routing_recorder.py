"""Writes down which experts every token of a model uses, while the model runs.

B sequences of a batch, S new tokens of each, T = B*S rows, L MoE layers, K top-k, D model dim.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from moe_runtime.errors import UnsupportedModelError
from moe_runtime.integrations.transformers.experts import argument_names
from moe_runtime.integrations.transformers.forward_rows import (
    inputs_of,
    named_arguments,
    positions_of,
)
from moe_runtime.integrations.transformers.routers import router_beside
from moe_runtime.measure.routing_sites import fused_sites, layer_ids, num_hidden_layers
from moe_runtime.trace import Phase, Trace
from moe_runtime.trace_fields import Array
from moe_runtime.trace_writer import TraceWriter

# A block is checked and written at once: enough rows to make that cheap for each.
_BLOCK_ROWS = 1024
_FLOAT16_MAX = torch.finfo(torch.float16).max


class RoutingRecorder:
    """While it is entered, every forward of `model` becomes one step of `writer`'s trace.

    Hooks see what the experts of each layer are given, so nothing is computed twice and the model's
    results stay the same; outside the `with` there are no hooks. `hidden` records what each router
    saw, in float16, where values beyond 65504 become 65504. `name` is the model's, for the trace,
    and `checkpoint` the digest of its weights, "" unknown.

    A forward without a cache, or with an empty one, starts new sequences; one that continues a
    cache continues the sequences of it. Rows of a batch that its attention mask hides are padding.
    So are rows of a sequence after one of `end_token_ids` was decoded: `generate()` goes on feeding
    finished sequences until the last of a batch ends. `domains` labels the sequences of the next
    forwards, one name for each in the batch; assign to it between batches.

    A forward that raises leaves no rows.
    """

    def __init__(
        self,
        model: nn.Module,
        writer: TraceWriter,
        *,
        name: str,
        checkpoint: str = "",
        hidden: bool = False,
        end_token_ids: Collection[int] = (),
    ) -> None:
        self.domains: Sequence[str] = ()
        self._model = model
        self._writer = writer
        self._sites = fused_sites(model)
        self._scalars = {
            "num_experts": max(site.num_experts for site in self._sites),
            "layer_ids": layer_ids(self._sites),
            "num_hidden_layers": num_hidden_layers(model, self._sites),
            "model": name,
            "checkpoint": checkpoint,
        }
        self._with_hidden = hidden
        self._end_token_ids = frozenset(end_token_ids)
        self._num_sequences = 0
        self._batches: WeakKeyDictionary[Any, _Batch] = WeakKeyDictionary()  # by their cache
        self._rows: _Rows | None = None  # of the forward that runs
        self._routing: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._hidden: dict[int, torch.Tensor] = {}
        self._pending: list[_Step] = []  # forwards that are not written yet
        self._num_pending_rows = 0
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> "RoutingRecorder":
        self._hooks = [
            self._model.register_forward_pre_hook(self._begin, with_kwargs=True),
            self._model.register_forward_hook(self._end, with_kwargs=True),
        ]
        for layer, site in enumerate(self._sites):
            names = argument_names(type(site.module))
            hook: Any = partial(self._on_experts, layer, names)
            self._hooks.append(site.module.register_forward_pre_hook(hook, with_kwargs=True))
            if self._with_hidden:
                hook = partial(self._on_router, layer)
                self._hooks.append(
                    router_beside(self._model, site).register_forward_pre_hook(
                        hook, with_kwargs=True
                    )
                )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._rows = None
        self._flush()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._routing.clear()
        self._hidden.clear()
        self._rows = self._rows_of(named_arguments(module, args, kwargs))

    def _on_experts(
        self,
        layer: int,
        names: tuple[str, ...],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        if self._rows is None:  # not called by the model that is watched
            return
        _, top_k_index, top_k_weights = (*args, *(kwargs[name] for name in names[len(args) :]))
        if layer in self._routing or top_k_index.shape[0] != self._rows.num_rows:
            raise UnsupportedModelError(
                f"the experts of {self._sites[layer].name} ran "
                f"{1 + (layer in self._routing)} times in a forward of {self._rows.num_rows} "
                f"tokens, on {top_k_index.shape[0]}; a trace holds one set of experts a token and "
                "layer, so this model cannot be recorded"
            )
        self._routing[layer] = top_k_index, top_k_weights

    def _on_router(
        self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        seen: torch.Tensor = args[0] if args else next(iter(kwargs.values()))
        # A copy: what follows may work in place.
        self._hidden[layer] = (
            seen.detach()
            .reshape(-1, seen.shape[-1])
            .clamp(-_FLOAT16_MAX, _FLOAT16_MAX)
            .to(torch.float16)
        )

    def _end(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        rows, self._rows = self._rows, None
        if rows is None or not self._routing:
            return
        cache = getattr(output, "past_key_values", None)
        if cache is not None:
            self._batches[cache] = rows.batch
        self._pending.append(self._step(rows))
        self._num_pending_rows += rows.num_rows
        if self._num_pending_rows >= _BLOCK_ROWS:
            self._flush()

    def _rows_of(self, kwargs: Mapping[str, Any]) -> "_Rows":
        """Who the rows of this forward are."""
        token_id, num_past = inputs_of(kwargs)
        num_sequences, num_new = token_id.shape
        cache = kwargs.get("past_key_values")
        batch = self._batches.get(cache) if num_past else None
        if batch is None or len(batch.sequence_ids) != num_sequences:
            batch = self._new_batch(num_sequences)
        position = positions_of(kwargs, num_sequences, num_new, num_past)
        is_decode = num_new == 1 and num_past > 0
        if is_decode and self._end_token_ids:
            position[batch.is_ended] = -1
            ends = [token in self._end_token_ids for token in token_id[:, 0].tolist()]
            batch.is_ended[ends] = True
        return _Rows(batch, token_id, position, is_decode)

    def _new_batch(self, num_sequences: int) -> "_Batch":
        first = self._num_sequences
        self._num_sequences += num_sequences
        names = [*self.domains[:num_sequences]]
        names += [""] * (num_sequences - len(names))
        return _Batch(
            sequence_ids=np.arange(first, first + num_sequences, dtype=np.int32),
            domains=np.array(names, np.str_),
            is_ended=np.zeros(num_sequences, np.bool_),
        )

    def _step(self, rows: "_Rows") -> "_Step":
        """Copies of what this forward's layers were given; they may reuse its memory."""
        index, weight = next(iter(self._routing.values()))
        blank = torch.full_like(index, -1), torch.zeros_like(weight)
        width = max(index.shape[1] for index, _ in self._routing.values())
        layers = [self._routing.get(layer, blank) for layer in range(len(self._sites))]
        hidden = [self._hidden[layer] for layer in sorted(self._hidden)]
        return _Step(
            rows=rows,
            topk=_stacked([index for index, _ in layers], width, fill=-1),
            weights=_stacked([weight.float() for _, weight in layers], width, fill=0),
            hidden=torch.stack(hidden, dim=1).cpu().numpy() if self._with_hidden else None,
        )

    def _flush(self) -> None:
        """Write what is pending: per forward little is done, and the rest here, for all at once."""
        steps, self._pending, self._num_pending_rows = self._pending, [], 0
        if not steps:
            return
        fields = _about([step.rows for step in steps]) | self._scalars
        topk = np.concatenate([step.topk for step in steps])
        weights = np.concatenate([step.weights for step in steps])
        fields["topk"], fields["weights"] = self._ranked(topk, weights)
        if self._with_hidden:
            fields["hidden"] = np.concatenate([step.hidden for step in steps])
        self._writer.append(Trace.of(fields, source="recording"))

    def _ranked(self, topk: Array, weights: Array) -> tuple[Array, Array]:
        """Largest weight first; ids that name no expert of a layer, as of another rank, last."""
        limits = np.array([site.num_experts for site in self._sites])[:, None]
        is_missing = (topk < 0) | (topk >= limits)
        order = np.argsort(np.where(is_missing, np.inf, -weights), axis=-1, kind="stable")
        topk = np.where(is_missing, -1, topk)
        return np.take_along_axis(topk, order, -1), np.take_along_axis(weights, order, -1)


@dataclass(frozen=True, slots=True)
class _Batch:
    """Sequences that run together, `[B]` each."""

    sequence_ids: Array
    domains: Array
    is_ended: Array  # changes while they run


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows of one forward, in the order in which the layers see them."""

    batch: _Batch
    token_id: Array  # [B, S]
    position: Array  # [B, S], -1 for padding
    is_decode: bool

    @property
    def num_rows(self) -> int:
        return int(self.token_id.size)


@dataclass(frozen=True, slots=True)
class _Step:
    """One forward, on the host."""

    rows: _Rows
    topk: Array  # [T, L, K]
    weights: Array  # [T, L, K]
    hidden: Array | None  # [T, L, D]


def _stacked(layers: Sequence[torch.Tensor], width: int, *, fill: int) -> Array:
    """`[T, L, K]` from `[T, k]` a layer; layers may differ in k."""
    padded = [functional.pad(x, (0, width - x.shape[1]), value=fill) for x in layers]
    stacked: Array = torch.stack(padded, dim=1).detach().cpu().numpy()  # sync: one a forward
    return stacked


def _about(forwards: Sequence[_Rows]) -> dict[str, Any]:
    """Which token of which sequence each row is, `[N]` each, for one forward after the other."""
    num_new = np.repeat(
        [rows.token_id.shape[1] for rows in forwards],
        [rows.token_id.shape[0] for rows in forwards],
    )
    num_rows = [rows.num_rows for rows in forwards]
    position = np.concatenate([rows.position.reshape(-1) for rows in forwards])
    phases = [Phase.DECODE if rows.is_decode else Phase.PREFILL for rows in forwards]
    phase = np.where(position < 0, Phase.PADDING, np.repeat(phases, num_rows))
    sequence_ids = np.concatenate([rows.batch.sequence_ids for rows in forwards])
    return {
        "token_id": np.concatenate([rows.token_id.reshape(-1) for rows in forwards]),
        "sequence_id": np.repeat(sequence_ids, num_new),
        "position": position,
        "phase": phase,
        "step": np.repeat(np.arange(len(forwards)), num_rows),
        "domain": np.repeat(np.concatenate([rows.batch.domains for rows in forwards]), num_new),
    }
