"""Coherent dispatch for models of transformers: their decoder layers hand rows to be stepped.

B sequences of a batch, S new tokens of each, D model dim.
"""

import weakref
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import DynamicCache

from moe_runtime.errors import ParallelError
from moe_runtime.integrations.transformers.decoder_halves import DecoderHalves
from moe_runtime.integrations.transformers.forward_rows import named_arguments
from moe_runtime.integrations.transformers.handle import Handle
from moe_runtime.parallel.coherent import CoherentDispatcher
from moe_runtime.parallel.coherent_forward import CoherentForward
from moe_runtime.parallel.context import SharedContext


def step_coherently(owner: Handle, halves: DecoderHalves) -> None:
    """From now on rows of the model stay where their experts are."""
    parallel = owner.parallel
    assert parallel is not None
    ledger = parallel.world.ledger
    forward = CoherentForward(
        parallel,
        CoherentDispatcher(parallel.plan, ledger),
        halves,
        SharedContext(halves.kv_shapes, ledger),
    )
    parallel.hand_over(halves.answer, forward.take_part)
    stepped = _SteppedLayers(forward, ledger.rank, ledger.num_ranks)
    hook = halves.base.register_forward_pre_hook(stepped.note, with_kwargs=True)
    first, *others = halves.layers
    first.__dict__["forward"] = stepped.run
    for layer in others:
        layer.__dict__["forward"] = _hand_on

    def undo() -> None:
        hook.remove()
        parallel.hand_over(None)
        for layer in halves.layers:
            layer.__dict__.pop("forward", None)

    owner.on_detach(undo)


def _hand_on(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return hidden_states


class _SteppedLayers:
    """Stands in the first decoder layer, and runs all of them; the others hand its output on.

    The user's cache gets, in place of keys, the number of the sequence at each position, so that it
    has the right length, and shows if sequences were reordered or cut.
    """

    def __init__(self, forward: CoherentForward, rank: int, num_ranks: int) -> None:
        self._forward = forward
        self._next_number, self._step = rank, num_ranks  # numbers of ranks never meet
        self._numbers: WeakKeyDictionary[Any, torch.Tensor] = WeakKeyDictionary()
        self._arguments: dict[str, Any] = {}

    def note(self, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember the arguments of a forward that layers do not get."""
        self._arguments = dict(named_arguments(base, args, kwargs))
        for name in ("output_hidden_states", "output_attentions"):
            if self._arguments.get(name):
                raise ParallelError(
                    f"{name} shows layers of one process, and under coherent dispatch their rows "
                    "are on all ranks; use dispatch alltoall"
                )

    def run(
        self,
        hidden_states: torch.Tensor,
        *_: Any,
        position_ids: torch.Tensor,
        past_key_values: Any = None,
        **__: Any,
    ) -> torch.Tensor:
        """`[B, S, D]` behind the last layer; zeros where the attention mask hides a token."""
        B, S, _D = hidden_states.shape
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        number_B = self._sequences(past_key_values, B, past)
        is_real = self._is_real(B, S, past, hidden_states.device)
        position_BS = position_ids.expand(B, S)
        with torch.no_grad():
            rows = self._forward.run(
                hidden_states[is_real],
                number_B.unsqueeze(1).expand(B, S)[is_real],
                position_BS[is_real].long(),
            )
        output = torch.zeros_like(hidden_states)
        output[is_real] = rows.to(output.dtype)
        if past_key_values is None:
            self._forward.forget(number_B.tolist())
        else:
            held = number_B.view(B, 1, 1, 1).expand(B, 1, S, 1)
            past_key_values.update(held, held, 0)
        return output

    def _sequences(self, cache: Any, num_sequences: int, past: int) -> torch.Tensor:
        """`[B]` numbers: new ones, or those of the cache that a forward goes on with."""
        if cache is not None and type(cache) is not DynamicCache:
            raise ParallelError(
                f"coherent dispatch keeps keys and values itself, and the cache is a "
                f"{type(cache).__name__}; use transformers' DynamicCache, or dispatch alltoall"
            )
        if past:
            known = self._numbers.get(cache)
            first: Any = cache.layers[0] if cache is not None else None
            held = first.keys[:, 0, :, 0]  # of the window alone, where the layer has one
            if (
                known is None
                or len(known) != num_sequences
                or not torch.equal(held, known.unsqueeze(1).expand(-1, held.shape[1]))
            ):
                raise ParallelError(
                    "sequences of the cache were reordered, copied or cut, as beam search and "
                    "assisted generation do; coherent dispatch knows sequences that grow by their "
                    "own tokens; use dispatch alltoall"
                )
            return known
        end = self._next_number + num_sequences * self._step
        numbers = torch.arange(self._next_number, end, self._step)
        self._next_number = end
        if cache is not None:
            self._numbers[cache] = numbers
            weakref.finalize(cache, _forget(self._forward), numbers.tolist())
        return numbers

    def _is_real(self, B: int, S: int, past: int, device: torch.device) -> torch.Tensor:
        """`[B, S]` bool: the new tokens that the attention mask shows."""
        mask = self._arguments.get("attention_mask")
        if mask is None:
            return torch.ones((B, S), dtype=torch.bool, device=device)
        if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or mask.shape[1] < S:
            raise ParallelError(
                "coherent dispatch needs an attention mask of a number for each token; give "
                "[batch, tokens], or use dispatch alltoall"
            )
        return mask[:, -S:].to(device) != 0


def _forget(forward: CoherentForward) -> Callable[[list[int]], None]:
    """What a dropped cache calls, without keeping the model alive."""
    held = weakref.ref(forward)

    def forget(numbers: list[int]) -> None:
        alive = held()
        if alive is not None:
            alive.forget(numbers)

    return forget
