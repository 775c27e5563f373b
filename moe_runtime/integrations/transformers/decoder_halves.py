"""Decoder layers of transformers taken apart: attention, router, and what follows the experts.

T tokens, R rows of any sequences, P positions of a context, D model dim.
"""

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moe_runtime.errors import UnsupportedModelError
from moe_runtime.integrations.transformers.sites import ExpertSite
from moe_runtime.parallel.context import KVShape, SharedContext
from moe_runtime.parallel.dispatcher import Rows
from moe_runtime.parallel.expert_parallel import ExpertParallel

_PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
_MASKED_ATTENTION = ("sdpa", "eager")  # those that take any mask
_FULL, _WINDOWED = "full_attention", "sliding_attention"
_TRIAL_TOKENS = 3


class _RoutedError(Exception):
    """Ends a layer's MoE block where it calls its experts."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows


class DecoderHalves:
    """The decoder layers of one model, run by halves on rows `[R, D]`.

    A layer must be what most families have: x + attention(norm(x)), then x + mlp(norm(x)), where
    experts see the second norm. A trial of both ways decides, bit by bit, without any expert.
    `in_any_order`: attention gets rows of any sequences, and sees what our mask shows. Raises
    UnsupportedModelError.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sites: Sequence[ExpertSite],
        parallel: ExpertParallel,
        *,
        in_any_order: bool,
    ) -> None:
        self.name = type(model).__name__
        self.base: Any = model.base_model
        self.config: Any = model.config.get_text_config()
        self.layers: list[Any] = list(getattr(self.base, "layers", ()))
        all_full = [_FULL] * len(self.layers)
        self._types: list[str] = list(getattr(self.config, "layer_types", None) or all_full)
        self._given: Callable[[Rows], torch.Tensor] | None = None
        numbers = {site.module: number for number, site in enumerate(sites)}
        self._moe_layer = [
            next((numbers[m] for m in layer.modules() if m in numbers), None)
            for layer in self.layers
        ]
        self._check_parts(len(sites))
        if in_any_order:
            self._check_attention()
        parallel.hand_over(self.answer)
        try:
            with torch.no_grad():
                self.kv_shapes, self.like = self._try()
        finally:
            parallel.hand_over(None)

    @property
    def num_layers(self) -> int:
        """Of the decoder."""
        return len(self.layers)

    def moe_layer(self, layer: int) -> int | None:
        """The number of the MoE layer in a decoder layer, None where it has a dense one."""
        return self._moe_layer[layer]

    def answer(self, moe_layer: int, rows: Rows) -> torch.Tensor:
        """What an experts module gets while a half runs: what was computed for it elsewhere."""
        if self._given is None:
            raise _RoutedError(rows)
        return self._given(rows)

    def attend(
        self,
        layer: int,
        hidden_RD: torch.Tensor,
        position_R: torch.Tensor,
        visible_RP: torch.Tensor,
        context: SharedContext,
    ) -> torch.Tensor:
        """The stream behind attention, with all rows in one batch of one sequence."""
        hidden = hidden_RD.unsqueeze(0)
        positions = position_R.unsqueeze(0)
        window = self._window(layer)
        if window is not None:
            visible_RP = visible_RP & (context.position_P > (position_R - window).unsqueeze(1))
        lowest = torch.finfo(hidden.dtype).min
        mask = torch.zeros(visible_RP.shape, dtype=hidden.dtype, device=hidden.device)
        part = self.attention(
            layer,
            hidden,
            attention_mask=mask.masked_fill_(~visible_RP, lowest)[None, None],
            position_ids=positions,
            position_embeddings=self._rotary(layer, hidden, positions),
            past_key_values=_ContextCache(context),
            use_cache=True,
        )
        return (hidden + part)[0]

    def attention(self, layer: int, hidden: torch.Tensor, **arguments: Any) -> torch.Tensor:
        """What attention adds to the stream `[B, S, D]`."""
        module = self.layers[layer]
        output: torch.Tensor = module.self_attn(
            hidden_states=module.input_layernorm(hidden), **arguments
        )[0]
        return output

    def route(self, layer: int, hidden_RD: torch.Tensor) -> Rows:
        """What the MoE block hands to its experts for these rows of the stream."""
        module = self.layers[layer]
        try:
            module.mlp(self.expert_input(layer, hidden_RD).unsqueeze(0))
        except _RoutedError as routed:
            return routed.rows
        raise self.refuse(f"layer {layer} has experts and calls none for some tokens")

    def expert_input(self, layer: int, hidden_RD: torch.Tensor) -> torch.Tensor:
        """The norm before the MoE block."""
        normed: torch.Tensor = self.layers[layer].post_attention_layernorm(hidden_RD)
        return normed

    def complete(
        self, layer: int, hidden_RD: torch.Tensor, experts_RD: torch.Tensor | None
    ) -> torch.Tensor:
        """The second half of the layer, by what experts made; None for a dense layer."""
        return self.second_half(layer, hidden_RD, lambda _: experts_RD)

    def second_half(
        self, layer: int, hidden_RD: torch.Tensor, experts: Callable[[Rows], Any]
    ) -> torch.Tensor:
        """x + mlp(norm(x)), where the experts module gets what `experts` returns."""
        self._given = experts
        try:
            block = self.layers[layer].mlp(self.expert_input(layer, hidden_RD).unsqueeze(0))
        finally:
            self._given = None
        output = block[0] if isinstance(block, tuple) else block  # some give router scores too
        behind: torch.Tensor = hidden_RD + output.reshape(hidden_RD.shape)
        return behind

    def trial_inputs(self, layer: int) -> tuple[torch.Tensor, dict[str, Any]]:
        """A short prompt of random hidden states, and what layers get beside it."""
        parameter = next(self.base.parameters())
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn((1, _TRIAL_TOKENS, self.config.hidden_size), generator=generator)
        hidden = hidden.to(parameter.device, parameter.dtype)
        positions = torch.arange(_TRIAL_TOKENS, device=parameter.device).unsqueeze(0)
        return hidden, {
            "attention_mask": None,
            "position_ids": positions,
            "position_embeddings": self._rotary(layer, hidden, positions),
        }

    def _rotary(self, layer: int, hidden: torch.Tensor, positions: torch.Tensor) -> Any:
        """What turns queries and keys; some families have one for each type of layer."""
        rotary = self.base.rotary_emb
        if "layer_type" in signature(rotary.forward).parameters:
            return rotary(hidden, positions, self._types[layer])
        return rotary(hidden, positions)

    def _window(self, layer: int) -> int | None:
        """How many positions a token of the layer sees, itself with them; None is all."""
        is_windowed = self._types[layer] == _WINDOWED
        return int(self.config.sliding_window) if is_windowed else None

    def refuse(self, why: str) -> UnsupportedModelError:
        """The error that names the model and the remedy."""
        return UnsupportedModelError(
            f"the decoder layers of {self.name} cannot be stepped row by row: {why}; use dispatch "
            "alltoall, allreduce or auto"
        )

    def _check_parts(self, num_sites: int) -> None:
        if not self.layers or not hasattr(self.base, "rotary_emb"):
            raise self.refuse("it has no layers with rotary positions")
        for number, layer in enumerate(self.layers):
            absent = [
                name for name in _PARTS if not isinstance(getattr(layer, name, None), nn.Module)
            ]
            if absent:
                raise self.refuse(f"layer {number} has no {', '.join(absent)}")
        if sum(number is not None for number in self._moe_layer) != num_sites:
            raise self.refuse("it has experts outside its decoder layers, or several in one")

    def _check_attention(self) -> None:
        window = getattr(self.config, "sliding_window", None)
        kinds = set(self._types) - {_FULL, *([_WINDOWED] if window else [])}
        has_types = bool(getattr(self.config, "layer_types", None))
        if kinds or (window is not None and not has_types):
            raise self.refuse(
                "it has attention other than full or sliding by layer "
                f"({', '.join(sorted(kinds)) or 'a window of all'})"
            )
        attention = getattr(self.config, "_attn_implementation", None)
        if attention not in _MASKED_ATTENTION:
            raise self.refuse(
                f"its attention {attention!r} takes no mask of ours; load "
                'with attn_implementation="sdpa"'
            )

    def _try(self) -> tuple[list[KVShape], Rows]:
        """Each layer by halves beside its own forward."""
        shapes: list[KVShape] = []
        like: Rows | None = None
        for number in range(self.num_layers):
            probe = _ProbeCache()
            try:
                hidden, arguments = self.trial_inputs(number)
                arguments["past_key_values"] = probe
                stream = (hidden + self.attention(number, hidden, **arguments))[0]
                by_halves = self.second_half(number, stream, _stand_in)
                whole = self._whole(number, hidden, arguments)
                routed = None if self._moe_layer[number] is None else self.route(number, stream)
            except UnsupportedModelError:
                raise
            except (AttributeError, TypeError, ValueError, RuntimeError, LookupError) as error:
                raise self.refuse(f"layer {number} says {type(error).__name__}: {error}") from error
            if not torch.equal(by_halves, whole):
                raise self.refuse(f"layer {number} is more than attention and a block behind norms")
            if routed is not None:
                if not torch.equal(routed.hidden, self.expert_input(number, stream)):
                    raise self.refuse(f"experts of layer {number} see more than the norm")
                like = Rows(routed.hidden[:0], routed.index[:0], routed.weights[:0])
            if probe.shape is None:
                raise self.refuse(f"attention of layer {number} caches no keys and values")
            shapes.append(probe.shape)
        assert like is not None
        return shapes, like

    def _whole(self, layer: int, hidden: torch.Tensor, arguments: Any) -> torch.Tensor:
        self._given = _stand_in
        try:
            output = self.layers[layer](hidden, **arguments)
        finally:
            self._given = None
        whole: torch.Tensor = output[0] if isinstance(output, torch.Tensor) else output[0][0]
        return whole


def _stand_in(rows: Rows) -> torch.Tensor:
    """For experts, in the trial: depends on all that they get."""
    share = (rows.weights * (rows.index + 1)).sum(1, keepdim=True)
    return rows.hidden * share.to(rows.hidden.dtype)


class _ContextCache:
    """The context as attention modules of transformers ask for it."""

    def __init__(self, context: SharedContext) -> None:
        self._context = context

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._context.update(layer_idx, keys, values)


class _ProbeCache:
    """Sees what attention would cache."""

    def __init__(self) -> None:
        self.shape: KVShape | None = None

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.shape = KVShape(
            key=(keys.shape[1], keys.shape[3]),
            value=(values.shape[1], values.shape[3]),
            dtype=keys.dtype,
        )
        return keys, values
