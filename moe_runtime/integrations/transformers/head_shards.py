"""Takes one rank's heads out of an attention module of transformers.

G ranks, H heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class HeadShare:
    """What a module gets for one rank: parameters by place, and how many heads share a key."""

    parameters: Sequence[tuple[nn.Module, str, torch.Tensor]]
    num_key_value_groups: int | None

    def apply(self, attention: Any) -> None:
        """Put it in; what was there is dropped unless `current` of it is kept."""
        for owner, name, tensor in self.parameters:
            owner._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        if self.num_key_value_groups is not None:
            attention.num_key_value_groups = self.num_key_value_groups

    def current(self, attention: Any) -> "HeadShare":
        """What `apply` would replace."""
        held = [(owner, name, owner._parameters[name]) for owner, name, _ in self.parameters]
        return HeadShare(held, getattr(attention, "num_key_value_groups", None))  # type: ignore[arg-type]

    def copied(self) -> "HeadShare":
        """In memory of its own, so that the whole parameters can go."""
        copies = [(owner, name, tensor.clone()) for owner, name, tensor in self.parameters]
        return HeadShare(copies, self.num_key_value_groups)


def head_share(attention: Any, rank: int, num_ranks: int) -> HeadShare:
    """Rank g of G has heads g H / G to (g + 1) H / G; key heads fewer than G are on several ranks.

    Raises ValueError where heads do not divide, AttributeError for parts that are called otherwise.
    """
    is_latent = hasattr(attention, "kv_b_proj")  # DeepSeek's: keys and values from one latent
    if is_latent:
        query = attention.q_proj if attention.q_proj is not None else attention.q_b_proj
        num_heads, num_key_heads = attention.num_heads, attention.num_heads
        projections = [(query, num_heads), (attention.kv_b_proj, num_heads)]
    else:
        num_heads = attention.q_proj.out_features // attention.head_dim
        num_key_heads = attention.k_proj.out_features // attention.head_dim
        projections = [
            (attention.q_proj, num_heads),
            (attention.k_proj, num_key_heads),
            (attention.v_proj, num_key_heads),
        ]
    if num_heads % num_ranks or (num_key_heads % num_ranks and num_ranks % num_key_heads):
        raise ValueError(
            f"{num_heads} heads, {num_key_heads} of keys, do not divide among {num_ranks} ranks"
        )
    taken: list[tuple[nn.Module, str, torch.Tensor]] = []
    for linear, heads in projections:
        first, last = _heads_of(rank, num_ranks, heads)
        for name in ("weight", "bias"):
            whole = linear._parameters.get(name)
            if whole is not None:
                size = len(whole) // heads
                taken.append((linear, name, whole.data[first * size : last * size]))
    first, last = _heads_of(rank, num_ranks, num_heads)
    output = attention.o_proj
    size = output.in_features // num_heads
    taken.append((output, "weight", output.weight.data[:, first * size : last * size]))
    if output.bias is not None:  # added once
        taken.append((output, "bias", output.bias.data * int(rank == 0)))
    if "sinks" in attention._parameters:
        taken.append((attention, "sinks", attention.sinks.data[first:last]))
    key_first, key_last = _heads_of(rank, num_ranks, num_key_heads)
    groups = None if is_latent else (last - first) // (key_last - key_first)
    return HeadShare(taken, groups)


def _heads_of(rank: int, num_ranks: int, heads: int) -> tuple[int, int]:
    first = rank * heads // num_ranks
    return first, max(first + 1, (rank + 1) * heads // num_ranks)
