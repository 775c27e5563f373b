"""The network that turns token ids into the routing of all layers.

B sequences, S new tokens, L MoE layers, E experts a layer, W width.
"""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self, cast

import numpy as np
import torch
from torch import Tensor, nn

from moe_runtime.predictors.predictor import ModelFacts
from moe_runtime.predictors.token_embedding import TokenEmbedding
from moe_runtime.predictors.transformer import Block, KeysValues, causal_mask
from moe_runtime.trace import Trace

MAX_BYTES = 8_000_000
_WIDTH = 128
_LEAST_ROWS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class PathSettings:
    """The network's sizes. `is_softmax`: a layer's logits are of one choice, not of E."""

    num_layers: int
    num_experts: int
    num_ids: int
    num_rows: int  # of the embedding
    width: int
    num_heads: int
    ffn_width: int
    num_encoder_blocks: int
    num_decoder_blocks: int
    context: int  # tokens that the decoder looks back on
    is_softmax: bool

    @classmethod
    def within_budget(
        cls,
        trace: Trace,
        facts: ModelFacts,
        *,
        has_encoder: bool,
        num_decoder_blocks: int = 2,
        is_softmax: bool = False,
    ) -> Self:
        """Whatever the model's vocabulary: rows of the embedding make way for the rest."""
        assert trace.token_id is not None
        embedding = facts.embedding
        num_ids = int(trace.token_id.max()) + 1 if embedding is None else len(embedding)
        found = cls(
            num_layers=trace.num_layers,
            num_experts=trace.num_experts,
            num_ids=num_ids,
            num_rows=1,
            width=_WIDTH,
            num_heads=4,
            ffn_width=2 * _WIDTH,
            num_encoder_blocks=int(has_encoder),
            num_decoder_blocks=num_decoder_blocks,
            context=512,
            is_softmax=is_softmax,
        )
        with torch.device("meta"):
            others = sum(p.numel() * 4 for p in PathNetwork(found).parameters())
        # The header of a file and the row of unknown ids take a little too.
        room = (MAX_BYTES - others - 16_384) // (4 * _WIDTH) - 1
        return cls(**(asdict(found) | {"num_rows": min(num_ids, max(room, _LEAST_ROWS))}))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class SequenceState(NamedTuple):
    """What is kept of one sequence: how long it is, and what later tokens look at."""

    length: int
    own: tuple[KeysValues, ...]  # one a decoder block
    memory: tuple[KeysValues, ...]  # of the encoder's states; empty without an encoder


class PathNetwork(nn.Module):
    """Token ids in, `[.., L, E]` logits out."""

    def __init__(self, settings: PathSettings) -> None:
        super().__init__()
        self.settings = settings
        sizes = settings.width, settings.num_heads, settings.ffn_width
        has_encoder = settings.num_encoder_blocks > 0
        self.embedding = TokenEmbedding(settings.num_ids, settings.num_rows, settings.width)
        self.encoder = nn.ModuleList(
            Block(*sizes, has_memory=False) for _ in range(settings.num_encoder_blocks)
        )
        # A state that is always there, so that a sequence without a prompt has a memory too.
        self.nothing = nn.Parameter(torch.zeros(1, 1, settings.width)) if has_encoder else None
        self.decoder = nn.ModuleList(
            Block(*sizes, has_memory=has_encoder) for _ in range(settings.num_decoder_blocks)
        )
        self.norm = nn.RMSNorm(settings.width)
        self.head = nn.Linear(settings.width, settings.num_layers * settings.num_experts)
        self.sharpness = nn.Parameter(torch.ones(settings.num_layers, 1))
        self.shift = nn.Parameter(torch.zeros(settings.num_layers, 1))

    def encode(self, token_id: Tensor, mask: Tensor | None = None) -> Tensor:
        """States `[B, S, W]` of a prompt; `mask` `[B, 1, 1, S]` is false where it is padded."""
        x: Tensor = self.embedding(token_id)
        position = torch.arange(token_id.shape[1]).expand(token_id.shape)
        for block in _blocks(self.encoder):
            x = block(x, position, block.new_keys_values(x, position), mask)
        return x

    def memory(self, states: Tensor) -> tuple[KeysValues, ...]:
        """What the decoder's blocks look at of the encoder's `states` `[B, S, W]`."""
        assert self.nothing is not None
        states = torch.cat([self.nothing.expand(len(states), -1, -1), states], dim=1)
        attentions = [block.memory for block in _blocks(self.decoder)]
        return tuple(one.keys_values(states, None) for one in attentions if one is not None)

    def decode(
        self,
        token_id: Tensor,
        start: int | Tensor,
        past: tuple[KeysValues, ...],
        memory: tuple[KeysValues, ...],
        memory_mask: Tensor | None = None,
    ) -> tuple[Tensor, tuple[KeysValues, ...]]:
        """States `[B, S, W]` of new tokens, and the KV cache with them in it.

        `start` is the first one's position, one for all or `[B, 1]`.
        """
        x: Tensor = self.embedding(token_id)
        num_new = token_id.shape[1]
        position = (torch.arange(num_new) + start).expand(token_id.shape)
        kept = []
        for index, block in enumerate(_blocks(self.decoder)):
            seen = block.new_keys_values(x, position)
            if past:
                seen = past[index].extended(seen, self.settings.context + num_new)
            mask = None if num_new == 1 else causal_mask(num_new, seen.keys.shape[2])
            x = block(x, position, seen, mask, memory[index] if memory else None, memory_mask)
            kept.append(seen)
        return x, tuple(kept)

    def logits(self, states: Tensor) -> Tensor:
        """`[.., L, E]` of states `[.., W]`."""
        found: Tensor = self.head(self.norm(states))
        return found.view(*found.shape[:-1], self.settings.num_layers, self.settings.num_experts)

    def step(self, token_id: Tensor, state: SequenceState | None) -> tuple[Tensor, SequenceState]:
        """Logits `[S, L, E]` of one sequence's new tokens `[S]`, and its state after them."""
        rows = token_id[None]
        if state is None and self.nothing is not None:
            states = self.encode(rows)
            new = SequenceState(len(token_id), (), self.memory(states))
        else:
            state = state or SequenceState(0, (), ())
            states, own = self.decode(rows, state.length, state.own, state.memory)
            new = SequenceState(state.length + len(token_id), own, state.memory)
        return self.logits(states)[0], new

    def chance(self, logits: Tensor) -> Tensor:
        """`[.., L, E]`: probabilities of being among the top-k."""
        if self.settings.is_softmax:
            logits = logits.log_softmax(-1) * self.sharpness + self.shift
        return logits.sigmoid()

    def start_at(self, shares: np.ndarray[Any, Any]) -> None:
        """Before training every token is given the shares `[L, E]` of all."""
        share = torch.from_numpy(shares).clamp(1e-4, 1 - 1e-4)
        wanted = share.log() if self.settings.is_softmax else share.logit()
        with torch.no_grad():
            self.head.bias.copy_(wanted.flatten())
            self.head.weight.mul_(0.1)


def _blocks(modules: nn.ModuleList) -> list[Block]:
    return cast("list[Block]", list(modules))
