"""A tensor described as boxes of tensors that lie in files, with the operations that move boxes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from moe_runtime.memory.safetensors_header import FileTensor


@dataclass(frozen=True, slots=True)
class Box:
    """`size` elements of `source`, strided, standing at `start` of the assembled tensor.

    Element `i` of the box is element `offset + sum(i[d] * stride[d])` of `source` and element
    `start + i` of the assembly. All counts are in elements.
    """

    source: FileTensor
    start: tuple[int, ...]
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class Assembly:
    """A tensor of `shape` tiled without overlap by `boxes`.

    Running a checkpoint conversion (stack, concatenate, transpose, split ...) on assemblies instead
    of weights gives, for each element of the result, its place on disk, and reads nothing.
    Worked example: stacking w[0], w[1] of shape (2, 3) gives shape (2, 2, 3) with two boxes of size
    (1, 2, 3) at (0, 0, 0) and (1, 0, 0); `select(0, 1)` gives back the box of w[1].
    """

    shape: tuple[int, ...]
    boxes: tuple[Box, ...]

    @classmethod
    def of(cls, tensor: FileTensor) -> "Assembly":
        """The assembly that is one whole file tensor."""
        zeros = (0,) * len(tensor.shape)
        box = Box(tensor, zeros, tensor.shape, row_major(tensor.shape), 0)
        return cls(tensor.shape, (box,))

    def select(self, dim: int, index: int) -> "Assembly":
        """The slice at `index` of `dim`, without that dimension."""
        return self.narrow(dim, index, 1).squeeze(dim)

    def narrow(self, dim: int, start: int, length: int) -> "Assembly":
        """Elements `start` to `start + length` of `dim`."""
        dim = self._dim(dim)
        assert 0 <= start <= start + length <= self.shape[dim], (self.shape, dim, start, length)
        boxes = []
        for box in self.boxes:
            first = max(start, box.start[dim])
            last = min(start + length, box.start[dim] + box.size[dim])
            if first < last:
                boxes.append(
                    replace(
                        box,
                        start=_with(box.start, dim, first - start),
                        size=_with(box.size, dim, last - first),
                        offset=box.offset + (first - box.start[dim]) * box.stride[dim],
                    )
                )
        return Assembly(_with(self.shape, dim, length), tuple(boxes))

    def permute(self, dims: Sequence[int]) -> "Assembly":
        """Dimensions in the order `dims`."""
        order = [self._dim(dim) for dim in dims]

        def reordered(values: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(values[dim] for dim in order)

        boxes = tuple(
            replace(b, start=reordered(b.start), size=reordered(b.size), stride=reordered(b.stride))
            for b in self.boxes
        )
        return Assembly(reordered(self.shape), boxes)

    def transpose(self, dim0: int, dim1: int) -> "Assembly":
        """Dimensions `dim0` and `dim1` exchanged."""
        dims = list(range(len(self.shape)))
        dim0, dim1 = self._dim(dim0), self._dim(dim1)
        dims[dim0], dims[dim1] = dims[dim1], dims[dim0]
        return self.permute(dims)

    def squeeze(self, dim: int) -> "Assembly":
        """Without `dim`, if its length is 1."""
        dim = self._dim(dim)
        if self.shape[dim] != 1:
            return self
        boxes = tuple(
            replace(b, start=_without(b.start, dim), size=_without(b.size, dim),
                    stride=_without(b.stride, dim))
            for b in self.boxes
        )  # fmt: skip
        return Assembly(_without(self.shape, dim), boxes)

    def unsqueeze(self, dim: int) -> "Assembly":
        """With a new dimension of length 1 before `dim`."""
        if dim < 0:
            dim += len(self.shape) + 1
        boxes = tuple(
            replace(b, start=_insert(b.start, dim, 0), size=_insert(b.size, dim, 1),
                    stride=_insert(b.stride, dim, 0))
            for b in self.boxes
        )  # fmt: skip
        return Assembly(_insert(self.shape, dim, 1), boxes)

    def split_dim(self, dim: int, outer: int, inner: int) -> "Assembly":
        """`dim` of length `outer * inner` seen as two dimensions, row-major."""
        dim = self._dim(dim)
        assert self.shape[dim] == outer * inner, (self.shape, dim, outer, inner)
        boxes = []
        for box in self.boxes:
            # A box may start or end inside a row of the new dimension: cut it at row borders.
            position, end = box.start[dim], box.start[dim] + box.size[dim]
            while position < end:
                row, column = divmod(position, inner)
                if column == 0 and end - position >= inner:
                    rows, columns = (end - position) // inner, inner
                else:
                    rows, columns = 1, min(inner - column, end - position)
                boxes.append(
                    Box(
                        box.source,
                        _split(box.start, dim, row, column),
                        _split(box.size, dim, rows, columns),
                        _split(box.stride, dim, box.stride[dim] * inner, box.stride[dim]),
                        box.offset + (position - box.start[dim]) * box.stride[dim],
                    )
                )
                position += rows * columns
        return Assembly(_split(self.shape, dim, outer, inner), tuple(boxes))

    def merge_dims(self, dim: int) -> "Assembly":
        """`dim` and the next seen as one dimension, row-major."""
        dim = self._dim(dim)
        inner = self.shape[dim + 1]
        boxes = []
        for box in self.boxes:
            rows, columns = box.size[dim], box.size[dim + 1]
            even = columns == inner and box.stride[dim] == columns * box.stride[dim + 1]
            # Rows that do not follow each other in the source become boxes of their own.
            parts = (
                [(0, rows * columns)] if even or rows == 1 else [(r, columns) for r in range(rows)]
            )
            for row, length in parts:
                boxes.append(
                    Box(
                        box.source,
                        _merge(box.start, dim, (box.start[dim] + row) * inner + box.start[dim + 1]),
                        _merge(box.size, dim, length),
                        _merge(box.stride, dim, box.stride[dim + 1]),
                        box.offset + row * box.stride[dim],
                    )
                )
        return Assembly(_merge(self.shape, dim, self.shape[dim] * inner), tuple(boxes))

    def _dim(self, dim: int) -> int:
        assert -len(self.shape) <= dim < len(self.shape), (self.shape, dim)
        return dim % len(self.shape)


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of a dense tensor of `shape`."""
    strides, step = [], 1
    for length in reversed(shape):
        strides.append(step)
        step *= length
    return tuple(reversed(strides))


def concatenate(parts: Sequence[Assembly], dim: int) -> Assembly:
    """`parts` one after the other along `dim`.

    Raises ValueError, naming the tensors, when their other dimensions differ.
    """
    first = parts[0]
    dim = first._dim(dim)
    boxes: list[Box] = []
    length = 0
    for part in parts:
        if _without(part.shape, dim) != _without(first.shape, dim):
            raise ValueError(
                f"{part.boxes[0].source} does not fit beside {first.boxes[0].source}: "
                f"shapes {list(part.shape)} and {list(first.shape)}"
            )
        boxes += (replace(b, start=_with(b.start, dim, b.start[dim] + length)) for b in part.boxes)
        length += part.shape[dim]
    return Assembly(_with(first.shape, dim, length), tuple(boxes))


def stack(parts: Sequence[Assembly], dim: int) -> Assembly:
    """`parts` as the slices of a new dimension `dim`."""
    for part in parts:
        if part.shape != parts[0].shape:
            raise ValueError(
                f"{part.boxes[0].source} differs in shape from {parts[0].boxes[0].source}"
            )
    return concatenate([part.unsqueeze(dim) for part in parts], dim)


def _with(values: tuple[int, ...], dim: int, value: int) -> tuple[int, ...]:
    return (*values[:dim], value, *values[dim + 1 :])


def _without(values: tuple[int, ...], dim: int) -> tuple[int, ...]:
    return (*values[:dim], *values[dim + 1 :])


def _insert(values: tuple[int, ...], dim: int, value: int) -> tuple[int, ...]:
    return (*values[:dim], value, *values[dim:])


def _split(values: tuple[int, ...], dim: int, outer: int, inner: int) -> tuple[int, ...]:
    return (*values[:dim], outer, inner, *values[dim + 1 :])


def _merge(values: tuple[int, ...], dim: int, value: int) -> tuple[int, ...]:
    return (*values[:dim], value, *values[dim + 2 :])
