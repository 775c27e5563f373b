"""A trace takes the place of a model's router."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from moe_runtime.errors import TraceError
from moe_runtime.trace import Phase, Trace


class RoutingReplay:
    """Gives each row of each forward the experts of the next row of a trace.

    Layer `l` of the model uses layer `l` of the trace; layers that the trace has beyond the model's
    are not used. The position advances by the rows of a forward, starts anew at the top after the
    last row, and `seek` sets it. Weights are the trace's where it has them, else the router's own.
    Unmodified transformers and offloaded models alike, with experts of transformers' common
    interface. A context manager: leaving it gives the router its say again.
    """

    def __init__(self, model: nn.Module, trace: Trace) -> None:
        modules = experts_modules(model)
        _check(trace, modules)
        rows = np.flatnonzero(trace.phase != Phase.PADDING)
        self._index_NLK = torch.from_numpy(trace.topk[rows].astype(np.int64))
        weights = trace.weights
        self._weights_NLK = None if weights is None else torch.from_numpy(weights[rows])
        self._positions = [0] * len(modules)
        self._hooks = [
            module.register_forward_pre_hook(self._hook(layer), with_kwargs=True)
            for layer, module in enumerate(modules)
        ]

    @property
    def position(self) -> int:
        """The row that the first layer is given next."""
        return self._positions[0]

    def seek(self, row: int) -> None:
        """The next forward starts with this row of the trace (padding rows not counted)."""
        self._positions = [row] * len(self._positions)

    def close(self) -> None:
        """Take the hooks out."""
        for hook in self._hooks:
            hook.remove()

    def _hook(self, layer: int) -> Any:
        def hook(
            module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]
        ) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
            named = dict(zip(("hidden_states", "top_k_index", "top_k_weights"), args, strict=False))
            index_TK = (named | kwargs)["top_k_index"]
            weights_TK = (named | kwargs)["top_k_weights"]
            self._move_to(index_TK.device)
            rows = self._advance(layer, len(index_TK), index_TK.device)
            replayed_TK = self._index_NLK[rows, layer].to(index_TK)
            if self._weights_NLK is None and replayed_TK.shape != index_TK.shape:
                raise TraceError(
                    f"the trace has top-{replayed_TK.shape[1]} without weights and the model's "
                    f"router gives {index_TK.shape[1]} weights; use a model with as many "
                    "(bench: leave out --model, and one is made)"
                )
            index_TK = replayed_TK
            if self._weights_NLK is not None:
                weights_TK = self._weights_NLK[rows, layer].to(weights_TK)
            hidden_TD = (named | kwargs)["hidden_states"]
            return (hidden_TD, index_TK, weights_TK), {}

        return hook

    def _move_to(self, device: torch.device) -> None:
        """Rows are where the model computes, so that no layer waits for them."""
        if self._index_NLK.device != device:
            self._index_NLK = self._index_NLK.to(device)
            if self._weights_NLK is not None:
                self._weights_NLK = self._weights_NLK.to(device)

    def _advance(self, layer: int, num_rows: int, device: torch.device) -> torch.Tensor:
        start = self._positions[layer]
        self._positions[layer] = start + num_rows
        return torch.arange(start, start + num_rows, device=device) % len(self._index_NLK)


@contextmanager
def replay_routing(model: nn.Module, trace: Trace) -> Iterator[RoutingReplay]:
    """Within it, `model` uses the experts that `trace` says."""
    replay = RoutingReplay(model, trace)
    try:
        yield replay
    finally:
        replay.close()


def experts_modules(model: nn.Module) -> list[nn.Module]:
    """Fused experts modules in layer order, wherever their parameters are: by marks alone."""
    return [m for m in model.modules() if hasattr(m, "is_transposed") and hasattr(m, "has_gate")]


def _check(trace: Trace, modules: list[nn.Module]) -> None:
    if not modules:
        raise TraceError(
            "this model has no experts of transformers' common interface, so its routing cannot be "
            "replaced; use a family of docs/families.md"
        )
    if len(modules) > trace.num_layers:
        raise TraceError(
            f"the model has {len(modules)} MoE layers and the trace {trace.num_layers}; "
            f"use a model with at most {trace.num_layers} (bench: --layers)"
        )
    num_experts = min(int(module.num_experts) for module in modules)  # type: ignore[arg-type]
    if trace.num_experts > num_experts:
        raise TraceError(
            f"the trace has {trace.num_experts} experts a layer and the model {num_experts}; "
            "use a model with as many (bench: leave out --model, and one is made)"
        )
    used = trace.topk[trace.phase != Phase.PADDING][:, : len(modules)]
    if (used < 0).any():
        row, layer = np.argwhere((used < 0).any(axis=2))[0]
        raise TraceError(
            f"row {row} of the trace lacks experts in layer {layer}; replay needs every row "
            "complete: select the rows or layers that are"
        )
