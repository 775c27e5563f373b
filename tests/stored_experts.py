"""Random experts as checkpoints store them: fp8, mxfp4 or packed, in blobs without any file."""

from pathlib import Path
from typing import Literal

import torch

from moe_runtime.expert import ExpertKey
from moe_runtime.kernels.cpu.unpack import load_codec
from moe_runtime.kernels.packed_blocks import PADDING_BYTES, BlockTask
from moe_runtime.kernels.scaled_blocks import FP8_BLOCK, MXFP4_GROUP
from moe_runtime.layer import ExpertMath
from moe_runtime.memory.assembly import Assembly, concatenate, stack
from moe_runtime.memory.layout import TORCH_DTYPES, ExpertLayout
from moe_runtime.memory.packed_blob import BlockPlace, BytePlace, PackedBlob
from moe_runtime.memory.packing import PackedBlock
from moe_runtime.memory.safetensors_header import FileTensor
from moe_runtime.memory.scaled_layer import scaled_layer
from moe_runtime.memory.scaled_tensor import ScaledTensor
from moe_runtime.memory.tensor_map import Extent, LayerExperts, TensorMap

# E experts, N rows and K columns of a weight, P blocks of B bytes

Form = Literal["plain", "fp8", "mxfp4", "packed"]
ROWS_PER_BLOCK = 24
CODES = {dtype: code for code, dtype in TORCH_DTYPES.items()}
NO_FILE = Path("nowhere")


def scaled_experts(
    math: ExpertMath,
    num_experts: int,
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    form: Form,
) -> LayerExperts:
    """A layer of matrices in `form`, gate and up of fp8 as two weights, and biases as they are."""
    places = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            places[name] = Assembly.of(file_tensor(name, CODES[dtype], (num_experts, *shape)))
            continue
        num_rows, num_columns = shape[::-1] if math.is_transposed else shape
        if form == "mxfp4":
            groups = (num_experts, num_rows, num_columns // MXFP4_GROUP)
            values = file_tensor(f"{name}_blocks", "U8", (*groups, MXFP4_GROUP // 2))
            scales = file_tensor(f"{name}_scales", "U8", groups)
            weights = Assembly.of(ScaledTensor.mxfp4(name, values, scales)).transpose(1, 2)
        else:
            num_parts = 2 if name == "gate_up_proj" else 1
            weights = stack(
                [
                    concatenate(
                        [
                            fp8_weight(f"{e}.{name}.{part}", num_rows // num_parts, num_columns)
                            for part in range(num_parts)
                        ],
                        0,
                    )
                    for e in range(num_experts)
                ],
                0,
            )
        places[name] = weights.transpose(1, 2) if math.is_transposed else weights
    return scaled_layer(num_experts, [(n, s, dtype) for n, s in shapes.items()], places, {})


def fp8_weight(name: str, num_rows: int, num_columns: int) -> Assembly:
    """One weight and its scales."""
    squares = (-(-num_rows // FP8_BLOCK), -(-num_columns // FP8_BLOCK))
    values = file_tensor(name, "F8_E4M3", (num_rows, num_columns))
    return Assembly.of(ScaledTensor.fp8(values, file_tensor(f"{name}_scale_inv", "F32", squares)))


def file_tensor(name: str, code: str, shape: tuple[int, ...]) -> FileTensor:
    """One of a file that nobody opens."""
    return FileTensor(name, NO_FILE, code, shape, 0, 0)


def random_stored(layout: ExpertLayout, generator: torch.Generator) -> torch.Tensor:
    """A blob whose weights are of the order of 1, or where they are quantised of a few tenths."""
    blob = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    for name, view in layout.views(blob).items():
        if view.dtype == torch.uint8:
            low, high = (122, 125) if name.endswith("scales") else (0, 256)
            view.copy_(torch.randint(low, high, view.shape, generator=generator))
        elif name.endswith("scales"):
            view.copy_((torch.rand(view.shape, generator=generator) + 0.5) / 8)
        else:
            view.copy_(torch.randn(view.shape, generator=generator))
    return blob


class PackedExperts:
    """A map of experts that stay packed, with their blobs in two blocks a matrix."""

    def __init__(self, tensor_map: TensorMap) -> None:
        self._tensor_map = tensor_map
        self._layouts: dict[ExpertKey, ExpertLayout] = {}

    def add(self, key: ExpertKey, plain: torch.Tensor) -> torch.Tensor:
        """The packed blob of the expert that is `plain`."""
        codec, layout = load_codec(), self._tensor_map.layout(key)
        blocks: list[BlockPlace] = []
        others: list[BytePlace] = []
        blob: list[torch.Tensor] = []
        end = 0
        for spec in layout.parameters:
            data = plain[spec.offset : spec.offset + spec.num_bytes]
            if len(spec.shape) != 2:
                others.append(BytePlace(end, spec.offset, spec.num_bytes))
                blob.append(padded(data, spec.num_bytes))
                end += len(blob[-1])
                continue
            rows = data.view(torch.int16).view(spec.shape).split(ROWS_PER_BLOCK)
            made = [codec.pack(part) for part in rows]
            num_bytes, first = max(map(len, made)), spec.offset
            for block, part in zip(made, rows, strict=True):
                blob.append(padded(block, num_bytes))
                about = PackedBlock(0, len(blob[-1]), *part.shape, 0, 0)
                blocks.append(BlockPlace(end, first, about))
                end, first = end + len(blob[-1]), first + part.nbytes
        compact = PackedBlob(tuple(blocks), tuple(others), end)
        self._layouts[key] = ExpertLayout(layout.parameters, layout.num_bytes, compact)
        return torch.cat(blob)

    def layout(self, key: ExpertKey) -> ExpertLayout:
        return self._layouts[key]

    def extents(self, key: ExpertKey) -> tuple[Extent, ...]:
        raise AssertionError("there is no file")


def padded(data: torch.Tensor, num_bytes: int) -> torch.Tensor:
    """`data` in so many bytes, and up to the next cache line."""
    room = torch.zeros(-(-num_bytes // PADDING_BYTES) * PADDING_BYTES, dtype=torch.uint8)
    room[: len(data)] = data
    return room


def cpu_unpack(blocks_PB: torch.Tensor, weights_NK: torch.Tensor, rows_per_block: int) -> None:
    """What a device's kernel does, which asks no block whose it is."""
    parts = weights_NK.split(rows_per_block)
    tasks = []
    for block, part in zip(blocks_PB, parts, strict=True):
        identity = int.from_bytes(bytes(block[8:16].tolist()), "little")
        N, K = part.shape
        tasks.append(BlockTask(block=block, N=N, K=K, identity=identity, weights=part))
    load_codec().run(tasks, is_known=True)
