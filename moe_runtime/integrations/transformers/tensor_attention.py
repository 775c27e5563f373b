"""Tensor-parallel attention for models of transformers, with rows summed where experts should be.

B sequences of a batch, S new tokens of each, T = B * S, D model dim.
"""

from typing import Any, NoReturn

import torch
from transformers import PreTrainedModel

from moe_runtime.errors import OffloadedExpertsError
from moe_runtime.integrations.transformers.decoder_halves import DecoderHalves
from moe_runtime.integrations.transformers.forward_rows import named_arguments
from moe_runtime.integrations.transformers.handle import Handle
from moe_runtime.integrations.transformers.head_shards import HeadShare, head_share
from moe_runtime.parallel.alltoall import AllToAllDispatcher
from moe_runtime.parallel.shuffled import ShuffledForward
from moe_runtime.parallel.waiting_ranks import WaitingRanks

# The sum over ranks beside the whole, in units of the dtype's precision times the largest number.
_ROUNDINGS = 16


def share_attention(model: PreTrainedModel, owner: Handle, waiting: WaitingRanks | None) -> None:
    """From now on this rank computes its heads alone. Raises UnsupportedModelError."""
    parallel = owner.parallel
    assert parallel is not None
    ledger, plan = parallel.world.ledger, parallel.plan
    halves = DecoderHalves(model, owner.sites, parallel, in_any_order=False)
    for layer, module in enumerate(halves.layers):
        _own_heads(halves, layer, ledger.rank, ledger.num_ranks).apply(module.self_attn)
    forward = ShuffledForward(parallel, AllToAllDispatcher(plan, ledger), halves.like, waiting)
    parallel.hand_over(halves.answer, forward.take_part)
    shared = _SharedLayers(halves, forward)
    halves.base.register_forward_pre_hook(shared.note, with_kwargs=True)
    for layer, module in enumerate(halves.layers):
        module.__dict__["forward"] = _Layer(shared, layer)
    owner.on_detach(_refuse_restore)


def _refuse_restore() -> NoReturn:
    raise OffloadedExpertsError(
        "a rank of tensor-parallel attention has a share of the heads, so the whole model cannot "
        "be restored; load it again"
    )


def _own_heads(halves: DecoderHalves, layer: int, rank: int, num_ranks: int) -> HeadShare:
    """This rank's share, if a trial shows that all shares add up to the whole."""
    attention = halves.layers[layer].self_attn
    hidden, arguments = halves.trial_inputs(layer)
    try:
        with torch.no_grad():
            shares = [head_share(attention, g, num_ranks) for g in range(num_ranks)]
            whole = halves.attention(layer, hidden, **arguments)
            before = shares[0].current(attention)
            total = torch.zeros_like(whole)
            try:
                for share in shares:
                    share.apply(attention)
                    total += halves.attention(layer, hidden, **arguments)
            finally:
                before.apply(attention)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise halves.refuse(f"heads of layer {layer} cannot be shared out: {error}") from error
    allowed = _ROUNDINGS * torch.finfo(whole.dtype).eps * float(whole.abs().max())
    if not bool(((total - whole).abs() <= allowed).all()):
        raise halves.refuse(f"heads of layer {layer} do not add up to its attention")
    return shares[rank].copied()


class _SharedLayers:
    """What the layers of one forward share."""

    def __init__(self, halves: DecoderHalves, forward: ShuffledForward) -> None:
        self.halves = halves
        self.forward = forward
        self.token_ids: torch.Tensor | None = None

    def note(self, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember the ids of a forward, which layers do not get."""
        self.token_ids = named_arguments(base, args, kwargs).get("input_ids")


class _Layer:
    """Stands in one decoder layer."""

    def __init__(self, shared: _SharedLayers, layer: int) -> None:
        self._shared = shared
        self._layer = layer

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        halves, forward, layer = self._shared.halves, self._shared.forward, self._layer
        stream_TD = hidden_states.flatten(0, 1)
        with torch.no_grad():
            if layer == 0:
                ids = self._shared.token_ids
                unknown = torch.full((len(stream_TD),), -1, device=stream_TD.device)
                forward.begin(stream_TD, unknown if ids is None else ids.flatten())
            part = halves.attention(layer, hidden_states, **arguments)
            output = forward.run_layer(
                halves.moe_layer(layer),
                stream_TD,
                part.flatten(0, 1),
                lambda rows, experts: halves.second_half(layer, rows, experts),
            )
            if layer == halves.num_layers - 1:
                forward.end()
        return output.view_as(hidden_states)
