"""Compiles transformers' own checkpoint conversion into places on disk."""

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)

from moe_runtime.errors import CheckpointError
from moe_runtime.memory.assembly import Assembly, concatenate, stack
from moe_runtime.memory.checkpoint import Checkpoint
from moe_runtime.memory.scaled_tensor import ScaledTensor


class SymbolicTensor:
    """Stands in for a weight while a conversion runs: moves boxes of file bytes, reads nothing.

    Implements what conversion operations call on tensors; torch functions arrive through
    `__torch_function__`. An operation that computes rather than moves raises NotImplementedError.
    """

    def __init__(self, assembly: Assembly) -> None:
        self.assembly = assembly

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.assembly.shape)

    @property
    def ndim(self) -> int:
        return len(self.assembly.shape)

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def contiguous(self) -> "SymbolicTensor":
        return self

    def transpose(self, dim0: int, dim1: int) -> "SymbolicTensor":
        return SymbolicTensor(self.assembly.transpose(dim0, dim1))

    def permute(self, *dims: int) -> "SymbolicTensor":
        return SymbolicTensor(self.assembly.permute(_flat(dims)))

    def squeeze(self, dim: int) -> "SymbolicTensor":
        return SymbolicTensor(self.assembly.squeeze(dim))

    def unsqueeze(self, dim: int) -> "SymbolicTensor":
        return SymbolicTensor(self.assembly.unsqueeze(dim))

    def narrow(self, dim: int, start: int, length: int) -> "SymbolicTensor":
        return SymbolicTensor(self.assembly.narrow(dim, start, length))

    def chunk(self, chunks: int, dim: int = 0) -> "tuple[SymbolicTensor, ...]":
        return self.split(-(-self.shape[dim] // chunks), dim)

    def split(self, sizes: int | Sequence[int], dim: int = 0) -> "tuple[SymbolicTensor, ...]":
        length = self.shape[dim]
        if isinstance(sizes, int):
            step = sizes
            sizes = [min(step, length - start) for start in range(0, length, step)]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return tuple(self.narrow(dim, s, n) for s, n in zip(starts, sizes, strict=True))

    def unbind(self, dim: int = 0) -> "tuple[SymbolicTensor, ...]":
        return tuple(SymbolicTensor(self.assembly.select(dim, i)) for i in range(self.shape[dim]))

    def reshape(self, *shape: int) -> "SymbolicTensor":
        return SymbolicTensor(_reshape(self.assembly, _flat(shape)))

    view = reshape

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = function.__name__
        if name in _JOINS:
            return cls(_join(name, *args, **(kwargs or {})))
        method = getattr(cls, name, None)
        if method is None:
            raise NotImplementedError(f"a checkpoint conversion uses torch.{name}")
        return method(*args, **{_METHOD_NAMES.get(k, k): v for k, v in (kwargs or {}).items()})


_JOINS = ("cat", "concat", "stack")
_METHOD_NAMES = {"split_size_or_sections": "sizes"}


def _join(name: str, tensors: Sequence[SymbolicTensor], dim: int = 0) -> Assembly:
    parts = [tensor.assembly for tensor in tensors]
    return stack(parts, dim) if name == "stack" else concatenate(parts, dim)


def _flat(values: Sequence[Any]) -> list[int]:
    return list(values[0]) if len(values) == 1 and not isinstance(values[0], int) else list(values)


def _reshape(assembly: Assembly, shape: list[int]) -> Assembly:
    """Split one dimension in two, or merge two neighbours, as (de)interleaving does."""
    old = list(assembly.shape)
    if old == shape:
        return assembly
    if len(shape) == len(old) + 1:
        for dim, length in enumerate(old):
            parts = shape[dim : dim + 2]
            if length == parts[0] * parts[1] and shape == [*old[:dim], *parts, *old[dim + 1 :]]:
                return assembly.split_dim(dim, parts[0], parts[1])
    if len(shape) == len(old) - 1:
        for dim in range(len(shape)):
            if shape == [*old[:dim], old[dim] * old[dim + 1], *old[dim + 2 :]]:
                return assembly.merge_dims(dim)
    raise NotImplementedError(f"a checkpoint conversion reshapes {old} to {shape}")


def assemble(
    model: nn.Module,
    weight_mapping: Sequence[WeightTransform],
    checkpoint: Checkpoint,
    wanted: Iterable[str],
) -> tuple[dict[str, Assembly], list[str]]:
    """Where the parameters `wanted` of `model` lie in `checkpoint`, and the other tensors' names.

    Runs the conversions that `from_pretrained` would run (renamings, then at most one converter per
    tensor), on symbols instead of weights. Raises CheckpointError, naming the parameter, when
    tensors are missing or disagree in shape or dtype.
    """
    wanted = set(wanted)
    parameters: dict[str, Any] = dict(model.state_dict())
    prefix = getattr(model, "base_model_prefix", None)
    renamings = [entry for entry in weight_mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in weight_mapping if isinstance(entry, WeightConverter)]
    by_pattern = {p: converter for converter in converters for p in converter.source_patterns}
    transforms: dict[str, WeightTransform] = {}
    others = []
    for name in sorted(checkpoint, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, parameters)
        if target not in parameters and name in parameters:
            target, pattern = rename_source_key(name, [], [], prefix, parameters)
        converter = by_pattern[pattern] if pattern is not None else None
        targets = _targets(target, converter)
        if not wanted.intersection(targets):
            others.append(name)
            continue
        if converter is None or pattern is None:
            transform = transforms.setdefault(target, WeightRenaming(name, target))
            pattern = name
        else:
            transform = transforms.setdefault(target, deepcopy(converter))
        tensor: Any = SymbolicTensor(Assembly.of(checkpoint[name]))
        transform.add_tensor(target, name, pattern, tensor)
    found: dict[str, Assembly] = {}
    for target, transform in transforms.items():
        found |= _convert(model, target, transform)
    for name in wanted:
        _check(name, found.get(name), tuple(parameters[name].shape), checkpoint)
    return {name: found[name] for name in wanted}, others


def _targets(first_target: str, converter: WeightConverter | None) -> list[str]:
    """All parameters that a converter makes, given the name of its first."""
    if converter is None or len(converter.target_patterns) == 1:
        return [first_target]
    first = converter.target_patterns[0]
    return [first_target.replace(first, pattern) for pattern in converter.target_patterns]


def _convert(model: nn.Module, target: str, transform: WeightTransform) -> dict[str, Assembly]:
    sources = sorted(transform.layer_targets[target])
    try:
        results = transform.convert(target, model=model, config=model.config)  # type: ignore[attr-defined]
    except NotImplementedError as error:
        raise CheckpointError(f"{target} cannot be read in place: {error}") from error
    except Exception as error:
        raise CheckpointError(
            f"the tensors for {target} do not fit together ({error}); "
            f"they are {', '.join(sources[:3])} ...: download the checkpoint again"
        ) from error
    return {
        name: (value[0] if isinstance(value, list) else value).assembly
        for name, value in results.items()
    }


def _check(
    name: str, assembly: Assembly | None, shape: tuple[int, ...], checkpoint: Checkpoint
) -> None:
    if assembly is None:
        raise CheckpointError(
            f"{checkpoint.folder} holds no tensor for {name}; download the checkpoint completely"
        )
    if assembly.shape != shape:
        first = assembly.boxes[0].source if assembly.boxes else "no tensor"
        raise CheckpointError(
            f"{name} must have shape {list(shape)} and its tensors in {checkpoint.folder} make "
            f"{list(assembly.shape)} (the first is {first}); a tensor is missing or misshapen"
        )
    first = assembly.boxes[0].source
    for box in assembly.boxes:
        if box.source.dtype != first.dtype:
            raise CheckpointError(
                f"experts of {name} disagree in dtype: {box.source} and {first}; "
                "save the checkpoint again in one dtype"
            )
        is_float = box.source.dtype in ("F64", "F32", "F16", "BF16")
        if not is_float and not isinstance(box.source, ScaledTensor):
            raise CheckpointError(
                f"{box.source} is quantised, and config.json does not say how; use a checkpoint "
                "in bfloat16, float16 or float32, or in fp8 or mxfp4 with a quantization_config"
            )
