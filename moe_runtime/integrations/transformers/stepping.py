"""Chooses what steps a model's decoder layers on several ranks, if transformers itself does not."""

from typing import Any

import torch
from transformers import PreTrainedModel

from moe_runtime.errors import UnsupportedModelError
from moe_runtime.integrations.transformers.coherent import step_coherently
from moe_runtime.integrations.transformers.decoder_halves import DecoderHalves
from moe_runtime.integrations.transformers.forward_rows import named_arguments
from moe_runtime.integrations.transformers.handle import Handle
from moe_runtime.integrations.transformers.ranks import Ranks
from moe_runtime.integrations.transformers.tensor_attention import share_attention
from moe_runtime.parallel.auto import AutoDispatcher
from moe_runtime.parallel.coherent import CoherentDispatcher
from moe_runtime.parallel.expected import Affinity, ExpectedBytes
from moe_runtime.parallel.expert_parallel import ExpertParallel
from moe_runtime.parallel.payload import ExactPayload
from moe_runtime.parallel.traffic import NUMBER_BYTES
from moe_runtime.parallel.waiting_ranks import WaitingRanks


def step_layers(model: PreTrainedModel, owner: Handle, ranks: Ranks) -> None:
    """Raises UnsupportedModelError and PlacementError; with one rank everything stays as it is."""
    parallel = owner.parallel
    assert parallel is not None
    waiting = None
    if ranks.tables is not None:
        waiting = WaitingRanks.of(ranks.tables, parallel.plan, parallel.world.ledger.device)
    if parallel.world.num_ranks == 1:
        return
    if parallel.dispatch == CoherentDispatcher.name:
        step_coherently(owner, DecoderHalves(model, owner.sites, parallel, in_any_order=True))
    elif parallel.dispatch == AutoDispatcher.name:
        # Coherent dispatch has neither rounded messages nor chunks.
        if ranks.payload == ExactPayload.name and ranks.pipeline == 1:
            _step_if_less(model, owner)
    elif ranks.attention == "tensor":
        share_attention(model, owner, waiting)
    elif waiting is not None:
        hook = model.base_model.register_forward_pre_hook(
            _NoteIds(parallel, waiting), with_kwargs=True
        )
        owner.on_detach(hook.remove)


def _step_if_less(model: PreTrainedModel, owner: Handle) -> None:
    """Coherent dispatch where formulas expect fewer bytes of it, as small keys and values allow."""
    parallel = owner.parallel
    assert parallel is not None
    try:
        halves = DecoderHalves(model, owner.sites, parallel, in_any_order=True)
    except UnsupportedModelError:
        return
    kv_bytes = sum(shape.num_bytes + NUMBER_BYTES for shape in halves.kv_shapes)
    plan, top_k = parallel.plan, halves.like.index.shape[1]
    even = Affinity.even(num_ranks=plan.num_ranks, num_experts=plan.num_experts, top_k=top_k)
    parallel.expected = ExpectedBytes.of(
        num_ranks=plan.num_ranks,
        top_k=top_k,
        affinity=Affinity.of(plan.placement, top_k) or even,
        row=halves.like.row_bytes(),
        kv_bytes_per_moe_layer=kv_bytes / len(owner.sites),
    )
    if parallel.expected.is_coherent_least:
        step_coherently(owner, halves)


class _NoteIds:
    """Tells, before a forward, which of its tokens the tables have seen."""

    def __init__(self, parallel: ExpertParallel, waiting: WaitingRanks) -> None:
        self._parallel = parallel
        self._waiting = waiting

    def __call__(self, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids: torch.Tensor | None = named_arguments(base, args, kwargs).get("input_ids")
        self._parallel.is_seen_T = (
            None if ids is None else self._waiting.is_seen(self._waiting.rows(ids.flatten()))
        )
