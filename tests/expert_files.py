"""Experts in real files, laid out in every way that families use, beside the weights they hold."""

import random
from dataclasses import dataclass, field
from pathlib import Path

import torch

from moe_runtime.memory.assembly import Assembly, concatenate, stack
from moe_runtime.memory.layout import ALIGNMENT_BYTES, TORCH_DTYPES, ExpertLayout
from moe_runtime.memory.safetensors_header import FileTensor
from moe_runtime.memory.tensor_map import LayerExperts, TensorMap

CODES = {dtype: code for code, dtype in TORCH_DTYPES.items()}
KINDS = ["separate", "halves", "fused", "transposed", "interleaved"]

Weights = dict[str, torch.Tensor]  # parameter name -> `[E, ...]`


class FileWriter:
    """Collects tensors, scatters them over files in random order, and says where each one lies."""

    def __init__(self, folder: Path, rng: random.Random, num_files: int) -> None:
        self._files = [folder / f"shard{i}.bin" for i in range(num_files)]
        self._rng = rng
        self._tensors: list[tuple[FileTensor, torch.Tensor]] = []
        self._ends = [0] * num_files

    def add(self, tensor: torch.Tensor) -> Assembly:
        """Reserve a place for `tensor`, sometimes right behind the last one, sometimes not."""
        which = self._rng.randrange(len(self._files))
        # An even gap of any size, as headers of any length make; or none: neighbours are coalesced.
        self._ends[which] += self._rng.choice([0, 0, 2 * self._rng.randrange(5000)])
        place = FileTensor(
            f"tensor{len(self._tensors)}",
            self._files[which],
            CODES[tensor.dtype],
            tuple(tensor.shape),
            self._ends[which],
            tensor.nbytes,
        )
        self._ends[which] += tensor.nbytes
        self._tensors.append((place, tensor.contiguous()))
        return Assembly.of(place)

    def add_all(self, tensors: list[torch.Tensor]) -> list[Assembly]:
        """Like `add`, in random order in the files."""
        places: dict[int, Assembly] = {}
        for index in self._rng.sample(range(len(tensors)), len(tensors)):
            places[index] = self.add(tensors[index])
        return [places[index] for index in range(len(tensors))]

    def write(self, tail_bytes: int = 0) -> None:
        """Write every file, with `tail_bytes` behind its last tensor."""
        contents = [bytearray(end + tail_bytes) for end in self._ends]
        for place, tensor in self._tensors:
            raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            which = self._files.index(place.file)
            contents[which][place.offset : place.offset + len(raw)] = raw
        for file, content in zip(self._files, contents, strict=True):
            file.write_bytes(content)


@dataclass
class Parameter:
    """One parameter of a layer: how it lies in the files, and what it must become."""

    name: str
    kind: str
    shape: tuple[int, ...]  # of one expert
    stored: torch.dtype = torch.bfloat16
    loaded: torch.dtype = torch.bfloat16
    phases: list[int] = field(default_factory=list)


def lay_out(
    parameter: Parameter, num_experts: int, writer: FileWriter, generator: torch.Generator
) -> tuple[Assembly, torch.Tensor]:
    """Store `parameter`; returns its places and its value `[E, ...]` in the loaded dtype."""
    stored = torch.randn((num_experts, *parameter.shape), generator=generator).to(parameter.stored)
    if parameter.kind == "separate":
        assembly = stack(writer.add_all(list(stored)), 0)
    elif parameter.kind == "halves":  # gate and up, one after the other in the parameter
        half = parameter.shape[0] // 2
        gates = stack(writer.add_all([t[:half] for t in stored]), 0)
        ups = stack(writer.add_all([t[half:] for t in stored]), 0)
        assembly = concatenate([gates, ups], 1)
    elif parameter.kind == "fused":
        assembly = writer.add(stored)
    elif parameter.kind == "transposed":
        assembly = writer.add(stored.transpose(1, -1).contiguous()).transpose(1, -1)
    else:  # rows gate0, up0, gate1, up1 ... in the file
        rows = parameter.shape[0]
        mixed = stored.reshape(num_experts, 2, rows // 2, *parameter.shape[1:]).transpose(1, 2)
        assembly = writer.add(mixed.reshape(stored.shape).contiguous())
        assembly = assembly.split_dim(1, rows // 2, 2).transpose(1, 2).merge_dims(1)
    return assembly, stored.to(parameter.loaded)


def make_layer(
    parameters: list[Parameter], num_experts: int, writer: FileWriter, generator: torch.Generator
) -> tuple[LayerExperts, Weights]:
    """A layer of experts in the files of `writer`, and the same weights in memory."""
    assemblies, weights = {}, {}
    for parameter in parameters:
        assemblies[parameter.name], weights[parameter.name] = lay_out(
            parameter, num_experts, writer, generator
        )
    phases = {p.name: p.phases for p in parameters if p.phases}
    layout = ExpertLayout.pack(
        [(p.name, p.shape, p.loaded) for p in parameters],
        phase_bytes=ALIGNMENT_BYTES if phases else 0,
    )
    return LayerExperts(num_experts, layout, assemblies, phases), weights


def random_layers(
    rng: random.Random, folder: Path, num_layers: int = 1, scale: int = 1
) -> tuple[TensorMap, list[Weights]]:
    """Layers with random shapes, kinds, dtypes and phases, in random files under `folder`."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    writer = FileWriter(folder, rng, rng.randint(1, 3))
    layers, weights = [], []
    for _ in range(num_layers):
        num_experts = rng.randint(1, 5)
        has_phases = rng.random() < 0.5
        parameters = []
        for index in range(rng.randint(1, 3)):
            dtypes = [torch.bfloat16, torch.float32, torch.float16]
            stored = rng.choice(dtypes)
            shape = tuple(2 * rng.randint(1, 12 * scale) for _ in range(rng.choice([1, 2, 2])))
            parameters.append(
                Parameter(
                    f"parameter{index}",
                    rng.choice(KINDS if len(shape) == 2 else KINDS[:3]),
                    shape,
                    stored,
                    rng.choice([stored, stored, rng.choice(dtypes)]),
                    [2 * 2 * rng.randrange(ALIGNMENT_BYTES // 4) for _ in range(num_experts)]
                    if has_phases
                    else [],
                )
            )
        layer, weight = make_layer(parameters, num_experts, writer, generator)
        layers.append(layer)
        weights.append(weight)
    writer.write(tail_bytes=rng.randrange(5000))
    return TensorMap(layers), weights
