"""Turns an assembly into the array it describes, the slow and obvious way."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe_runtime.memory.assembly import Assembly
from moe_runtime.memory.safetensors_header import FileTensor

Numbers = NDArray[np.int64]


class Sources:
    """Made-up file tensors whose elements are all different numbers."""

    def __init__(self) -> None:
        self._arrays: dict[FileTensor, Numbers] = {}
        self._next = 0

    def new(self, shape: Sequence[int]) -> tuple[Assembly, Numbers]:
        """A whole tensor, as an assembly and as the numbers it stands for."""
        count = int(np.prod(shape, dtype=np.int64))
        numbers = np.arange(self._next, self._next + count, dtype=np.int64).reshape(shape)
        self._next += count
        name = f"tensor{len(self._arrays)}"
        tensor = FileTensor(name, Path("made-up"), "I64", tuple(shape), 0, 8 * count)
        self._arrays[tensor] = numbers
        return Assembly.of(tensor), numbers

    def gather(self, assembly: Assembly) -> Numbers:
        """The numbers of `assembly`; asserts that its boxes cover every element exactly once."""
        numbers = np.full(assembly.shape, -1, dtype=np.int64)
        for box in assembly.boxes:
            assert len(box.start) == len(box.size) == len(box.stride) == len(assembly.shape)
            flat = self._arrays[box.source].reshape(-1)
            for index in itertools.product(*map(range, box.size)):
                place = tuple(s + i for s, i in zip(box.start, index, strict=True))
                assert numbers[place] == -1, f"{box} overlaps another at {place}"
                step = sum(i * s for i, s in zip(index, box.stride, strict=True))
                assert box.offset + step >= 0
                numbers[place] = flat[box.offset + step]
        assert (numbers >= 0).all(), "boxes leave holes"
        return numbers
