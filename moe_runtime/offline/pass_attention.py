"""Attention of one layer in one pass: sequences that decode over pages, prompts over themselves.

N decoding sequences, T tokens of a pass, H query heads, G key-value heads, t tokens of one prompt,
d width of queries and keys, v of values.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional

from moe_runtime.offline.kv_pages import KVPages, PassLayout

# Queries of a prompt whose scores stand in memory together.
_QUERY_CHUNK = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionRule:
    """What one layer does beside softmax(q k / scale): which keys are seen, and who else shares."""

    scaling: float
    window: int | None  # a query sees so many tokens, itself included
    sink_H: torch.Tensor | None  # a score of each head that takes its share and gives nothing
    softcap: float | None


def attend(
    pages: KVPages,
    layer: int,
    layout: PassLayout,
    rule: AttentionRule,
    query_HTd: torch.Tensor,
    key_GTd: torch.Tensor,
    value_GTv: torch.Tensor,
) -> torch.Tensor:
    """Store keys and values of the pass and return what its queries see: `[T, H, v]`."""
    stored = pages.layers[layer]
    stored.write(key_GTd.transpose(0, 1), value_GTv.transpose(0, 1), layout)
    num_decoding = layout.num_decoding
    out_THv = query_HTd.new_empty(query_HTd.shape[1], query_HTd.shape[0], value_GTv.shape[-1])
    if num_decoding:
        out_THv[:num_decoding] = pages.attention.run(
            query_HTd[:, :num_decoding].transpose(0, 1),
            stored.key_BGdP,
            stored.value_BGPv,
            layout.table_NB,
            layout.length_N,
            scaling=rule.scaling,
            window=rule.window,
            sink_H=rule.sink_H,
            softcap=rule.softcap,
        )
    for prompt in layout.prompts:
        rows = slice(prompt.begin, prompt.end)
        out_THv[rows] = prompt_attention(
            query_HTd[:, rows], key_GTd[:, rows], value_GTv[:, rows], rule
        ).transpose(0, 1)
    return out_THv


def prompt_attention(
    query_Htd: torch.Tensor, key_Gtd: torch.Tensor, value_Gtv: torch.Tensor, rule: AttentionRule
) -> torch.Tensor:
    """Causal attention of one prompt: `[H, t, v]`."""
    num_tokens = query_Htd.shape[1]
    sees_all = rule.window is None or num_tokens <= rule.window
    is_plain = sees_all and rule.sink_H is None and not rule.softcap
    group = query_Htd.shape[0] // key_Gtd.shape[0]
    key_Htd = key_Gtd.repeat_interleave(group, 0)
    value_Htv = value_Gtv.repeat_interleave(group, 0)
    if is_plain and key_Gtd.shape[-1] == value_Gtv.shape[-1]:  # else torch holds all scores
        return functional.scaled_dot_product_attention(
            query_Htd[None], key_Htd[None], value_Htv[None], is_causal=True, scale=rule.scaling
        )[0]
    parts = []
    for begin in range(0, num_tokens, _QUERY_CHUNK):
        end = min(begin + _QUERY_CHUNK, num_tokens)
        first = 0 if rule.window is None else max(0, begin - rule.window + 1)
        query_position = torch.arange(begin, end)[:, None]
        key_position = torch.arange(first, end)[None, :]
        is_seen = key_position <= query_position
        if rule.window is not None:
            is_seen &= key_position > query_position - rule.window
        scores = query_Htd[:, begin:end].float() @ key_Htd[:, first:end].float().mT
        weights = _weights(scores, is_seen, rule)
        parts.append((weights @ value_Htv[:, first:end].float()).to(query_Htd.dtype))
    return torch.cat(parts, 1)


def _weights(scores: torch.Tensor, is_seen: torch.Tensor, rule: AttentionRule) -> torch.Tensor:
    """Softmax over the last dimension of float32 `[H, queries, keys]`, by `rule`."""
    scores = scores * rule.scaling
    if rule.softcap:
        scores = torch.tanh(scores / rule.softcap) * rule.softcap
    scores = scores.masked_fill(~is_seen, -torch.inf)
    if rule.sink_H is None:
        return scores.softmax(-1)
    sink = rule.sink_H.float()[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
