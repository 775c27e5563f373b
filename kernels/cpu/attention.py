"""Attention of decoding sequences over keys and values in pages, by the C library beside this file.

N sequences, H query heads, G key-value heads, d width of queries and keys, v of values, P tokens a
page, B pages of the store, b pages of the longest sequence.
"""

import ctypes

import torch

from moe_runtime.kernels.cpu.attention_status import (
    LEVELS,
    PAGE_TOKENS,
    attention_status,
    open_attention_library,
)
from moe_runtime.kernels.cpu.openmp import find_openmp

TORCH = "torch"
_VALUE_LANES = 16  # of values that the kernel adds up together
_MOST_KEY_WIDTH = 1024
_KINDS = {torch.float32: 0, torch.bfloat16: 1}
_PAIRS = 2  # bfloat16 throughout, which some processors multiply in pairs


class _Operation(ctypes.Structure):
    """`struct moe_attention`."""

    _fields_ = (
        ("query", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("sinks", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("num_sequences", ctypes.c_int64),
        ("num_heads", ctypes.c_int64),
        ("num_groups", ctypes.c_int64),
        ("key_width", ctypes.c_int64),
        ("value_width", ctypes.c_int64),
        ("table_width", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("kind", ctypes.c_int64),
        ("scaling", ctypes.c_double),
        ("next", ctypes.c_int64),
        ("openmp", ctypes.c_void_p),
    )


class PagedAttention:
    """One query a sequence against all its keys, read once for all query heads that share them.

    Sums and softmax are in float32; bits do not depend on the number of threads, nor on the other
    sequences. Where queries, keys and values are bfloat16, weights may be rounded to it before they
    meet the values, as in transformers' own attention. Without a library, and for what the library
    does not compute, torch does.
    """

    def __init__(self, library: ctypes.CDLL | None, level: int = 0) -> None:
        self._openmp = find_openmp()
        self._level = level
        self._run = None
        if library is not None:
            self._run = library.moe_attention_run
            self._run.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
            self._run.restype = None

    @classmethod
    def load(cls, level: str | None = None) -> "PagedAttention":
        """The fastest of `LEVELS` here, or torch where `status` says why; or the one that is named.

        Raises ValueError for a level that this machine does not have.
        """
        library = open_attention_library()
        levels = () if isinstance(library, str) else LEVELS[: library.moe_attention_levels() + 1]
        if level not in (None, TORCH, *levels):
            raise ValueError(
                f"attention level {level!r} is not there; choose from {', '.join((TORCH, *levels))}"
            )
        if isinstance(library, str) or level == TORCH:
            return cls(None)
        return cls(library, LEVELS.index(level or levels[-1]))

    @staticmethod
    def status() -> str:
        """What computes decode attention on this machine, and why."""
        return attention_status()

    def run(
        self,
        query_NHd: torch.Tensor,
        key_BGdP: torch.Tensor,
        value_BGPv: torch.Tensor,
        table_Nb: torch.Tensor,
        length_N: torch.Tensor,
        *,
        scaling: float,
        window: int | None,
        sink_H: torch.Tensor | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """`[N, H, v]` in the dtype of the query: sequence n sees its last `window` tokens.

        Row n of `table_Nb` (int64) names the pages of its `length_N[n]` (int64) tokens, the query's
        own included. `sink_H` adds exp(sink) to each head's sum of weights.
        """
        _check(query_NHd, key_BGdP, value_BGPv, table_Nb, length_N)
        is_ours = (
            self._run is not None
            and not softcap
            and key_BGdP.dtype in _KINDS
            and value_BGPv.shape[-1] % _VALUE_LANES == 0
            and key_BGdP.shape[2] <= _MOST_KEY_WIDTH
            and value_BGPv.shape[-1] <= _MOST_KEY_WIDTH
        )
        sink = None if sink_H is None else sink_H.detach().float().contiguous()
        if not is_ours:
            return paged_attention(
                query_NHd, key_BGdP, value_BGPv, table_Nb, length_N,
                scaling=scaling, window=window, sink_H=sink, softcap=softcap,
            )  # fmt: skip
        assert self._run is not None
        N, H, d = query_NHd.shape
        query = query_NHd.float().contiguous()
        out = torch.empty(N, H, value_BGPv.shape[-1])
        is_paired = query_NHd.dtype == key_BGdP.dtype == torch.bfloat16
        kind = _PAIRS if is_paired else _KINDS[key_BGdP.dtype]
        operation = _Operation(
            query.data_ptr(),
            key_BGdP.data_ptr(),
            value_BGPv.data_ptr(),
            table_Nb.data_ptr(),
            length_N.data_ptr(),
            None if sink is None else sink.data_ptr(),
            out.data_ptr(),
            N,
            H,
            key_BGdP.shape[1],
            d,
            value_BGPv.shape[-1],
            table_Nb.shape[1],
            0 if window is None else window,
            kind,
            scaling,
            0,
            None if self._openmp is None else ctypes.addressof(self._openmp),
        )
        self._run(ctypes.addressof(operation), self._level, torch.get_num_threads())
        return out.to(query_NHd.dtype)


def paged_attention(
    query_NHd: torch.Tensor,
    key_BGdP: torch.Tensor,
    value_BGPv: torch.Tensor,
    table_Nb: torch.Tensor,
    length_N: torch.Tensor,
    *,
    scaling: float,
    window: int | None,
    sink_H: torch.Tensor | None,
    softcap: float | None,
) -> torch.Tensor:
    """What `PagedAttention.run` computes, by torch, one sequence after the other."""
    N, H, d = query_NHd.shape
    G = key_BGdP.shape[1]
    out = query_NHd.new_empty(N, H, value_BGPv.shape[-1])
    for n, length in enumerate(length_N.tolist()):
        first = 0 if window is None else max(0, length - window)
        pages = table_Nb[n, : -(-length // PAGE_TOKENS)]
        key_GdL = key_BGdP[pages].permute(1, 2, 0, 3).flatten(2)[..., first:length].float()
        value_GLv = value_BGPv[pages].transpose(0, 1).flatten(1, 2)[:, first:length].float()
        scores = query_NHd[n].view(G, H // G, d).float() @ key_GdL * scaling
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        if sink_H is not None:
            scores = torch.cat([scores, sink_H.float().view(G, H // G, 1)], -1)
        weights = scores.softmax(-1)[..., : length - first]
        out[n] = (weights @ value_GLv).flatten(0, 1).to(out.dtype)
    return out


def _check(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
) -> None:
    """ValueError for what would read memory that is not the tensors'."""
    N, H, d = query.shape
    B, G, width, P = keys.shape
    if (width, P) != (d, PAGE_TOKENS) or values.shape[:3] != (B, G, P) or H % G:
        raise ValueError(
            f"keys {tuple(keys.shape)} and values {tuple(values.shape)} do not fit queries "
            f"{tuple(query.shape)}: they must be [B, G, {d}, {PAGE_TOKENS}] and "
            f"[B, G, {PAGE_TOKENS}, v], with G a divisor of {H}"
        )
    tensors = (query, keys, values, table, lengths)
    if not all(tensor.is_cpu for tensor in tensors) or keys.dtype != values.dtype:
        raise ValueError("queries, keys and values must be on the CPU, keys and values alike")
    if not all(tensor.is_contiguous() for tensor in tensors[1:]):
        raise ValueError("keys, values, table and lengths must be contiguous")
    if table.dtype != torch.int64 or lengths.dtype != torch.int64:
        raise ValueError(f"table and lengths must be int64, got {table.dtype} and {lengths.dtype}")
    if lengths.shape != (N,) or len(table) != N:
        raise ValueError(f"{N} queries need as many lengths and rows of the table")
    if N and not (int(lengths.min()) >= 1 and int(lengths.max()) <= table.shape[1] * P):
        raise ValueError(f"lengths must be from 1 to the {table.shape[1]} pages of the table")
    if N and not (int(table.min()) >= 0 and int(table.max()) < B):
        raise ValueError(f"the table names pages outside the {B} that there are")
