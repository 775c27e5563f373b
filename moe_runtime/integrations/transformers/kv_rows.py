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


def row_bytes(cache: Any, num_rows: int) -> int:
    """Bytes of what `cache` holds for each of its `num_rows` sequences."""
    total_bytes: int = sum(holder[name].nbytes for holder, name in _places(cache, num_rows))
    return total_bytes // num_rows


def select_rows(cache: Any, num_rows: int, rows: Sequence[int]) -> None:
    """Keep `rows` of `num_rows`, in that order."""
    index = torch.tensor(rows)
    for holder, name in _places(cache, num_rows):
        tensor = holder[name]
        holder[name] = tensor.index_select(0, index.to(tensor.device))


def exchange_rows(
    caches: tuple[Any, Any], num_rows: tuple[int, int], pairs: Sequence[tuple[int, int]]
) -> None:
    """Exchange row `i` of the first cache with row `j` of the second, for each pair (i, j)."""
    first_rows, second_rows = (torch.tensor(rows) for rows in zip(*pairs, strict=True))
    for first, second in _alike(caches, num_rows):
        device = first.device
        leaving = first[first_rows.to(device)]
        first[first_rows.to(device)] = second[second_rows.to(device)]
        second[second_rows.to(device)] = leaving


def append_rows(caches: tuple[Any, Any], num_rows: tuple[int, int]) -> None:
    """Give the first cache the rows of the second too, behind its own."""
    joined = [torch.cat(pair) for pair in _alike(caches, num_rows)]
    for (holder, name), tensor in zip(list(_places(caches[0], num_rows[0])), joined, strict=True):
        holder[name] = tensor


def _alike(
    caches: tuple[Any, Any], num_rows: tuple[int, int]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The tensors of two caches that hold the same of their sequences."""
    places = (_places(cache, number) for cache, number in zip(caches, num_rows, strict=True))
    for (first, name), (second, other_name) in zip(*places, strict=True):
        assert name == other_name, (name, other_name)
        yield first[name], second[other_name]


def _places(cache: Any, num_rows: int) -> Iterator[_Place]:
    for layer in cache.layers:
        yield from _in_dict(vars(layer), lambda tensor: len(tensor) == num_rows)


def _in_dict(holder: dict[Any, Any], is_by_row: Callable[[torch.Tensor], bool]) -> Iterator[_Place]:
    for name, value in list(holder.items()):
        if isinstance(value, dict):
            yield from _in_dict(value, is_by_row)
        elif isinstance(value, torch.Tensor) and value.dim() > 1 and is_by_row(value):
            yield holder, name
