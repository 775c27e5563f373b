"""Laws of conversion: transformers' operations move symbols as they move weights."""

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    ErnieFuseAndSplitTextVisionExperts,
    Interleave,
    MergeModulelist,
    Split,
    SplitModulelist,
    Transpose,
)

from moe_runtime.integrations.transformers.conversion import SymbolicTensor
from tests.materialise import Sources

Inputs = Mapping[str, Sequence[Sequence[int]]]  # pattern -> shapes of its tensors
sizes = st.sampled_from([1, 2, 3, 4])


def assert_same(
    operation: ConversionOps,
    inputs: Inputs,
    targets: list[str],
    lists: bool = True,
    **context: Any,
) -> None:
    """Run `operation` on weights and on symbols and compare element for element."""
    sources = Sources()
    symbols: dict[str, Any] = {}
    weights: dict[str, Any] = {}
    for pattern, shapes in inputs.items():
        pairs = [sources.new(shape) for shape in shapes]
        symbols[pattern] = [SymbolicTensor(assembly) for assembly, _ in pairs]
        weights[pattern] = [torch.from_numpy(numbers) for _, numbers in pairs]
        if not lists:
            symbols[pattern], weights[pattern] = symbols[pattern][0], weights[pattern][0]
    patterns = list(inputs)
    expected = operation.convert(
        weights, source_patterns=patterns, target_patterns=targets, **context
    )
    found = operation.convert(symbols, source_patterns=patterns, target_patterns=targets, **context)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert tuple(found[name].shape) == tuple(weight.shape)
        assert np.array_equal(sources.gather(found[name].assembly), weight.numpy())


@given(shape=st.tuples(sizes, sizes, sizes), dim=st.integers(0, 2), parts=st.integers(1, 4))
@settings(max_examples=25)
def test_chunk(shape: tuple[int, ...], dim: int, parts: int) -> None:
    """Law: Chunk cuts symbols as it cuts weights, unequal pieces included."""
    assert_same(Chunk(dim), {"source": [shape]}, [f"part{i}" for i in range(parts)])


def test_chunk_by_config() -> None:
    """Law: Chunk into as many parts as a config field says works on symbols."""
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_experts=3))
    assert_same(Chunk(0, "num_experts"), {"source": [(6, 2)]}, ["experts.*.weight"], config=config)


@given(lengths=st.tuples(sizes, sizes, sizes), dim=st.integers(0, 1))
@settings(max_examples=15)
def test_split(lengths: tuple[int, int, int], dim: int) -> None:
    """Law: Split by the sizes of the model's parameters works on symbols."""
    shapes: dict[str, list[int]] = {}
    for name, length in zip(("q", "k", "v"), lengths, strict=True):
        shapes[f"layer.{name}"] = [2, 2]
        shapes[f"layer.{name}"][dim] = length
    model = SimpleNamespace(get_parameter=lambda name: torch.empty(shapes[name]))
    fused = [2, 2]
    fused[dim] = sum(lengths)
    assert_same(
        Split(dim), {"qkv": [fused]}, ["q", "k", "v"], full_layer_name="layer.q", model=model
    )


@given(lengths=st.lists(sizes, min_size=1, max_size=3), dim=st.integers(0, 1))
@settings(max_examples=15)
def test_concatenate(lengths: list[int], dim: int) -> None:
    """Law: Concatenate keeps the order of the source patterns on symbols."""
    shapes = [[2, 2] for _ in lengths]
    for shape, length in zip(shapes, lengths, strict=True):
        shape[dim] = length
    inputs = {f"source{i}": [shape] for i, shape in enumerate(shapes)}
    assert_same(Concatenate(dim), inputs, ["target"])
    assert_same(Concatenate(dim), inputs, ["target"], lists=False)


@given(half=sizes, other=sizes, last=sizes, dim=st.integers(0, 2), inverse=st.booleans())
@settings(max_examples=40)
def test_interleave(half: int, other: int, last: int, dim: int, inverse: bool) -> None:
    """Law: Interleave, both ways, moves symbols as weights."""
    shape = [other, last]
    shape.insert(dim, 2 * half)
    assert_same(Interleave(dim, inverse), {"source": [shape]}, ["target"])


@given(count=st.integers(1, 4), dim=st.integers(0, 2), num_patterns=st.integers(1, 2))
@settings(max_examples=15)
def test_merge_module_list(count: int, dim: int, num_patterns: int) -> None:
    """Law: MergeModulelist stacks symbols, alone or first in a chain."""
    inputs = {f"experts.*.w{i}": [(2, 3)] * count for i in range(num_patterns)}
    assert_same(MergeModulelist(dim), inputs, ["target"])


@given(shape=st.tuples(sizes, sizes, sizes), dim=st.integers(0, 2), num_patterns=st.integers(1, 2))
@settings(max_examples=15)
def test_split_module_list(shape: tuple[int, ...], dim: int, num_patterns: int) -> None:
    """Law: SplitModulelist unstacks symbols, and keeps dimensions of length 1."""
    inputs = {f"experts.*.w{i}": [shape] for i in range(num_patterns)}
    assert_same(SplitModulelist(dim), inputs, ["target.*"])


@pytest.mark.parametrize("check_dims", [False, True])
@given(shape=st.tuples(sizes, sizes, sizes), dims=st.permutations(range(3)))
@settings(max_examples=15)
def test_transpose(check_dims: bool, shape: tuple[int, ...], dims: list[int]) -> None:
    """Law: Transpose moves symbols as weights, and with check_dims only when shapes call for it."""
    for expected in (shape, shape[::-1]):
        model = SimpleNamespace(get_parameter=lambda name, s=expected: torch.empty(s))
        assert_same(
            Transpose(dims[0], dims[1], check_dims),
            {"source": [shape]},
            ["target"],
            model=model,
            full_layer_name="target",
        )


@given(experts=st.integers(1, 3), rows=sizes, columns=sizes)
@settings(max_examples=15)
def test_ernie_and_back(experts: int, rows: int, columns: int) -> None:
    """Law: Ernie's fuse-and-split of text and vision experts, and its inverse, work on symbols."""
    operation = ErnieFuseAndSplitTextVisionExperts(stack_dim=0, concat_dim=1)
    shapes = [(rows, columns)] * (2 * experts)
    context = {"config": None}
    assert_same(operation, {"gate": shapes, "up": shapes}, ["text", "vision"], **context)
    fused = [(experts, 2 * rows, columns)]
    assert_same(
        operation.reverse_op,
        {"text": fused, "vision": fused},
        ["experts.*.gate", "experts.*.up"],
        **context,
    )


CHAINS: dict[str, Callable[[Any], Any]] = {
    "merge then concatenate": lambda t: torch.cat([torch.stack([t, t]), torch.stack([t, t])], 1),
    "unbind": lambda t: torch.unbind(t, 1)[0],
    "narrow": lambda t: torch.narrow(t, 1, 1, 2),
    "split sizes": lambda t: torch.split(t, [1, 2, 1], dim=1)[1],
    "split by name": lambda t: torch.split(t, split_size_or_sections=3, dim=1)[1],
    "permute": lambda t: torch.permute(t, (1, 0)),
    "methods": lambda t: t.unsqueeze(0).permute(2, 0, 1).squeeze(1).contiguous(),
    "reshape back": lambda t: t.reshape(2, 2, 4).transpose(0, 1).reshape([4, 4]),
    "view": lambda t: t.view(4, 2, 2),
}


@pytest.mark.parametrize("name", CHAINS)
def test_functions_and_methods(name: str) -> None:
    """Law: moves written as torch functions or methods give the same elements."""
    sources = Sources()
    assembly, numbers = sources.new((4, 4))
    found, expected = (
        CHAINS[name](SymbolicTensor(assembly)),
        CHAINS[name](torch.from_numpy(numbers)),
    )
    assert found.shape == expected.shape
    assert found.size() == expected.size()
    assert found.size(0) == expected.size(0)
    assert found.dim() == found.ndim == expected.dim()
    assert np.array_equal(sources.gather(found.assembly), expected.numpy())


def test_computing_is_refused() -> None:
    """Law: what would need the weights' values raises NotImplementedError naming it."""
    symbol = SymbolicTensor(Sources().new((4, 6))[0])
    with pytest.raises(NotImplementedError, match=r"torch\.add"):
        torch.add(symbol, 1)  # type: ignore[call-overload]
    with pytest.raises(NotImplementedError, match=r"reshapes \[4, 6\] to \[3, 8\]"):
        symbol.reshape(3, 8)
