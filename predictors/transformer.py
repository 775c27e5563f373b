"""Small transformer blocks with their own KV cache, for predictors that read token ids.

B sequences, S new tokens, P past tokens, M memory states, W width, H heads.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

_ROPE_BASE = 10_000.0


class KeysValues(NamedTuple):
    """What attention has kept of earlier tokens, `[B, H, P, W / H]` each."""

    keys: Tensor
    values: Tensor

    def extended(self, new: "KeysValues", limit: int) -> "KeysValues":
        """With `new` behind, and only the last `limit` of all."""
        keys = torch.cat([self.keys, new.keys], dim=2)[:, :, -limit:]
        return KeysValues(keys, torch.cat([self.values, new.values], dim=2)[:, :, -limit:])


class Attention(nn.Module):
    """Multi-head attention with rotary positions (arXiv 2104.09864) where positions are given."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def keys_values(self, x: Tensor, position: Tensor | None) -> KeysValues:
        """Of `x` `[B, S, W]` at `position` `[B, S]`."""
        keys, values = self.key_value(x).chunk(2, dim=-1)
        keys = _rotated(self._heads(keys), position)
        return KeysValues(keys, self._heads(values))

    def forward(
        self, x: Tensor, seen: KeysValues, position: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """`x` `[B, S, W]` looks at `seen`; `mask` is true where it may, over `[B, H, S, P]`."""
        query = _rotated(self._heads(self.query(x)), position)
        found = functional.scaled_dot_product_attention(
            query, seen.keys, seen.values, attn_mask=mask
        )
        mixed: Tensor = self.output(found.transpose(1, 2).flatten(2))
        return mixed

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)


class Block(nn.Module):
    """Self-attention, attention to a memory where it `has_memory`, and a gated feed-forward."""

    def __init__(self, width: int, num_heads: int, ffn_width: int, *, has_memory: bool) -> None:
        super().__init__()
        self.own_norm = nn.RMSNorm(width)
        self.own = Attention(width, num_heads)
        self.memory_norm = nn.RMSNorm(width) if has_memory else None
        self.memory = Attention(width, num_heads) if has_memory else None
        self.ffn_norm = nn.RMSNorm(width)
        self.up = nn.Linear(width, 2 * ffn_width, bias=False)
        self.down = nn.Linear(ffn_width, width, bias=False)

    def new_keys_values(self, x: Tensor, position: Tensor) -> KeysValues:
        """What the tokens `x` `[B, S, W]` leave for later ones."""
        return self.own.keys_values(self.own_norm(x), position)

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        seen: KeysValues,
        mask: Tensor | None,
        memory: KeysValues | None = None,
        memory_mask: Tensor | None = None,
    ) -> Tensor:
        """`[B, S, W]`; `seen` holds the keys of `x` itself too."""
        x = x + self.own(self.own_norm(x), seen, position, mask)
        if self.memory is not None and self.memory_norm is not None:
            assert memory is not None
            x = x + self.memory(self.memory_norm(x), memory, None, memory_mask)
        gate, up = self.up(self.ffn_norm(x)).chunk(2, dim=-1)
        y: Tensor = x + self.down(functional.silu(gate) * up)
        return y


def causal_mask(num_new: int, num_seen: int) -> Tensor:
    """`[S, P]`: the new tokens are the last of the seen, and none sees what comes after it."""
    ones = torch.ones(num_new, num_seen, dtype=torch.bool)
    return ones.tril(num_seen - num_new)


def _rotated(x: Tensor, position: Tensor | None) -> Tensor:
    if position is None:
        return x
    half = x.shape[-1] // 2
    rates = _ROPE_BASE ** -(torch.arange(half, dtype=torch.float32) / half)
    angle = position[:, None, :, None].float() * rates
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)
