"""Laws of assemblies: moving boxes is moving elements."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.memory.assembly import Assembly, concatenate, stack
from tests.materialise import Numbers, Sources

Pair = tuple[Assembly, Numbers]
Step = Callable[[st.DataObject, Pair], Pair]

MAX_DIMS = 4
MAX_ELEMENTS = 400


def draw_dim(data: st.DataObject, numbers: Numbers) -> int:
    return data.draw(st.integers(-numbers.ndim, numbers.ndim - 1), "dim")


def select(data: st.DataObject, pair: Pair) -> Pair:
    assembly, numbers = pair
    dim = draw_dim(data, numbers)
    index = data.draw(st.integers(0, numbers.shape[dim] - 1), "index")
    return assembly.select(dim, index), np.take(numbers, index, axis=dim)


def narrow(data: st.DataObject, pair: Pair) -> Pair:
    assembly, numbers = pair
    dim = draw_dim(data, numbers)
    start = data.draw(st.integers(0, numbers.shape[dim] - 1), "start")
    length = data.draw(st.integers(1, numbers.shape[dim] - start), "length")
    rows = np.arange(start, start + length)
    return assembly.narrow(dim, start, length), np.take(numbers, rows, axis=dim)


def permute(data: st.DataObject, pair: Pair) -> Pair:
    assembly, numbers = pair
    dims = data.draw(st.permutations(range(numbers.ndim)), "dims")
    return assembly.permute(dims), numbers.transpose(dims)


def transpose(data: st.DataObject, pair: Pair) -> Pair:
    assembly, numbers = pair
    dim0, dim1 = draw_dim(data, numbers), draw_dim(data, numbers)
    return assembly.transpose(dim0, dim1), np.swapaxes(numbers, dim0, dim1)


def squeeze(data: st.DataObject, pair: Pair) -> Pair:
    assembly, numbers = pair
    dim = draw_dim(data, numbers)
    after = numbers.squeeze(dim) if numbers.shape[dim] == 1 else numbers
    return assembly.squeeze(dim), after


def unsqueeze(data: st.DataObject, pair: Pair) -> Pair:
    assembly, numbers = pair
    dim = data.draw(st.integers(-numbers.ndim - 1, numbers.ndim), "dim")
    return assembly.unsqueeze(dim), np.expand_dims(numbers, dim)


def split_dim(data: st.DataObject, pair: Pair) -> Pair:
    assembly, numbers = pair
    dim = draw_dim(data, numbers) % numbers.ndim
    length = numbers.shape[dim]
    outer = data.draw(st.sampled_from([n for n in range(1, length + 1) if length % n == 0]))
    shape = (*numbers.shape[:dim], outer, length // outer, *numbers.shape[dim + 1 :])
    return assembly.split_dim(dim, outer, length // outer), numbers.reshape(shape)


def merge_dims(data: st.DataObject, pair: Pair) -> Pair:
    assembly, numbers = pair
    if numbers.ndim < 2:
        assembly, numbers = unsqueeze(data, pair)
    dim = data.draw(st.integers(0, numbers.ndim - 2), "dim")
    shape = (*numbers.shape[:dim], -1, *numbers.shape[dim + 2 :])
    return assembly.merge_dims(dim), numbers.reshape(shape)


def stack_with_parts(data: st.DataObject, pair: Pair) -> Pair:
    """Stack two equal-sized pieces of the tensor, the second one transposed if it is square."""
    assembly, numbers = pair
    dim = data.draw(st.integers(-numbers.ndim - 1, numbers.ndim), "dim")
    second = (assembly, numbers)
    if numbers.ndim >= 2 and numbers.shape[0] == numbers.shape[1]:
        second = (assembly.transpose(0, 1), np.swapaxes(numbers, 0, 1))
    return stack([assembly, second[0]], dim), np.stack([numbers, second[1]], dim)


def concatenate_parts(data: st.DataObject, pair: Pair) -> Pair:
    """Cut the tensor somewhere and put the pieces back in another order."""
    assembly, numbers = pair
    dim = draw_dim(data, numbers)
    length = numbers.shape[dim]
    cut = data.draw(st.integers(1, length), "cut")
    pieces = [(0, cut)] if cut == length else [(cut, length - cut), (0, cut)]
    parts = [assembly.narrow(dim, *piece) for piece in pieces]
    arrays = [np.take(numbers, np.arange(s, s + n), axis=dim) for s, n in pieces]
    return concatenate(parts, dim), np.concatenate(arrays, dim)


SHRINKING: list[Step] = [select, narrow, squeeze]
KEEPING: list[Step] = [permute, transpose, merge_dims, concatenate_parts]
GROWING: list[Step] = [unsqueeze, split_dim, stack_with_parts]

shapes = st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=3)


@pytest.mark.parametrize("step", SHRINKING + KEEPING + GROWING, ids=lambda s: s.__name__)
@given(data=st.data())
@settings(max_examples=25)
def test_one_operation_equals_numpy(step: Step, data: st.DataObject) -> None:
    """Law: each operation on boxes gives the elements that numpy's gives."""
    sources = Sources()
    assembly, numbers = step(data, sources.new(data.draw(shapes, "shape")))
    assert assembly.shape == numbers.shape
    assert np.array_equal(sources.gather(assembly), numbers)


@given(data=st.data())
@settings(max_examples=300)
def test_compositions_equal_numpy(data: st.DataObject) -> None:
    """Law: any chain of operations over several tensors gives a whole of the right elements."""
    sources = Sources()
    shape = data.draw(shapes, "shape")
    parts = [sources.new(shape) for _ in range(data.draw(st.integers(1, 3), "parts"))]
    pair: Pair = (stack([a for a, _ in parts], 0), np.stack([n for _, n in parts], 0))
    for _ in range(data.draw(st.integers(1, 7), "steps")):
        steps = list(KEEPING)
        if pair[1].ndim > 1:
            steps += SHRINKING
        if pair[1].ndim < MAX_DIMS and pair[1].size * 2 <= MAX_ELEMENTS:
            steps += GROWING
        pair = data.draw(st.sampled_from(steps), "step")(data, pair)
        assert pair[0].shape == pair[1].shape
    assert np.array_equal(sources.gather(pair[0]), pair[1])


def test_worked_example_of_the_docstring() -> None:
    """Law: stacked tensors are one box each, and selecting gives one of them back."""
    sources = Sources()
    (first, _), (second, numbers) = sources.new((2, 3)), sources.new((2, 3))
    both = stack([first, second], 0)
    assert [(b.start, b.size) for b in both.boxes] == [
        ((0, 0, 0), (1, 2, 3)),
        ((1, 0, 0), (1, 2, 3)),
    ]
    assert np.array_equal(sources.gather(both.select(0, 1)), numbers)


def test_misfitting_shapes_are_named() -> None:
    """Law: joining tensors of different shapes raises ValueError naming both."""
    sources = Sources()
    first, second = sources.new((2, 3))[0], sources.new((2, 4))[0]
    with pytest.raises(ValueError, match=r"tensor1.*does not fit beside tensor0.*\[2, 4\]"):
        concatenate([first, second], 0)
    with pytest.raises(ValueError, match=r"tensor1.*differs in shape from tensor0"):
        stack([first, second], 0)
