"""Moves sequences between the attention caches of two batches, whatever their layers hold.

Every tensor of a cache whose first dimension is the batch belongs to its sequences, row by row:
keys and values, and the states of linear attention. Both caches have seen the same number of
tokens, padding included, so that rows fit beside each other.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

# A place that holds a tensor of a cache: attributes of a layer, or entries of a dict in it.
_Place = tuple[dict[Any, Any], Any]


def kv_bytes(cache: Any, num_rows: int) -> int:
    """Bytes of what `cache` holds for its `num_rows` sequences."""
    return sum(holder[name].nbytes for holder, name in _places(cache, num_rows))


def select_rows(cache: Any, num_rows: int, rows: Sequence[int]) -> None:
    """Keep `rows` of `num_rows`, in that order."""
    index = torch.tensor(rows)
    for holder, name in _places(cache, num_rows):
        tensor = holder[name]
        holder[name] = tensor.index_select(0, index.to(tensor.device))


def regroup_rows(
    caches: tuple[Any, Any],
    num_rows: tuple[int, int],
    rows: tuple[Sequence[int], Sequence[int]],
) -> int:
    """Deal the sequences of two caches out anew; returns the bytes that were copied.

    `rows[k]` are those of cache `k` afterwards: `0 .. a-1` are of the first cache before, `a ..`
    of the second. A cache that gets none is left alone, and is not to be used any more.
    """
    copied_bytes = 0
    indices = [torch.tensor(wanted) for wanted in rows]
    pairs = zip(_places(caches[0], num_rows[0]), _places(caches[1], num_rows[1]), strict=True)
    for (first, name), (second, other_name) in list(pairs):
        joined = torch.cat([first[name], second[other_name]])
        places: list[_Place] = [(first, name), (second, other_name)]
        for (holder, key), index in zip(places, indices, strict=True):
            if len(index):
                holder[key] = joined.index_select(0, index.to(joined.device))
        copied_bytes += joined.nbytes
    return copied_bytes


def _places(cache: Any, num_rows: int) -> Iterator[_Place]:
    for layer in cache.layers:
        yield from _in_dict(vars(layer), lambda tensor: len(tensor) == num_rows)


def _in_dict(holder: dict[Any, Any], is_by_row: Callable[[torch.Tensor], bool]) -> Iterator[_Place]:
    for name, value in list(holder.items()):
        if isinstance(value, dict):
            yield from _in_dict(value, is_by_row)
        elif isinstance(value, torch.Tensor) and value.dim() > 1 and is_by_row(value):
            yield holder, name
