"""Laws of the tensor map: extents cover exactly what an expert needs, neighbours in one read."""

import random
from pathlib import Path

import pytest
import torch

from moe_runtime.expert import ExpertKey
from moe_runtime.memory.layout import ALIGNMENT_BYTES, ExpertLayout
from moe_runtime.memory.tensor_map import ByteMove, StridedMove, TensorMap
from tests.expert_files import FileWriter, Parameter, make_layer, random_layers


@pytest.mark.parametrize("seed", range(60))
def test_moves_cover_an_expert_once(seed: int, tmp_path: Path) -> None:
    """Law: the moves of an expert fill each of its elements once; extents are disjoint per kind."""
    tensor_map, weights = random_layers(random.Random(seed), tmp_path)
    layer = tensor_map.layers[0]
    for expert in range(layer.num_experts):
        key = ExpertKey(0, expert)
        layout = tensor_map.layout(key)
        filled = torch.zeros(tensor_map.slot_bytes, dtype=torch.int32)
        for extent in tensor_map.extents(key):
            for move in extent.moves:
                assert extent.offset <= move.file_offset
                assert move.file_offset + move.num_bytes <= extent.offset + extent.num_bytes
                if isinstance(move, ByteMove):
                    filled[move.blob_offset : move.blob_offset + move.num_bytes] += 1
                else:
                    assert isinstance(move, StridedMove)
                    spec = move.parameter
                    counts = filled[spec.offset : spec.offset + spec.num_bytes]
                    box = counts.view(*spec.shape, spec.dtype.itemsize)
                    for dim, (start, size) in enumerate(zip(move.start, move.size, strict=True)):
                        box = box.narrow(dim, start, size)
                    box += 1
        for spec in layout.parameters:
            assert (filled[spec.offset : spec.offset + spec.num_bytes] == 1).all()
            filled[spec.offset : spec.offset + spec.num_bytes] = 0
        assert not filled.any(), "bytes between parameters are written"
        assert all(name in weights[0] for name in (s.name for s in layout.parameters))


def test_neighbours_are_one_extent(tmp_path: Path) -> None:
    """Law: an expert whose tensors follow each other in a file is read in one piece."""
    writer = FileWriter(tmp_path, random.Random(0), 1)
    writer._rng.choice = lambda options: options[0]  # type: ignore[method-assign]  # no gaps
    generator = torch.Generator().manual_seed(0)
    parameters = [Parameter("up", "separate", (8, 4)), Parameter("down", "separate", (4, 8))]
    layer, _ = make_layer(parameters, 1, writer, generator)
    (extent,) = TensorMap([layer]).extents(ExpertKey(0, 0))
    assert extent.num_bytes == 2 * 8 * 4 * 2
    assert len(extent.moves) == 2


def test_fused_expert_is_a_slice(tmp_path: Path) -> None:
    """Law: of a fused tensor only the expert's own bytes are read, and copied as they are."""
    writer = FileWriter(tmp_path, random.Random(0), 1)
    layer, _ = make_layer(
        [Parameter("up", "fused", (8, 4))], 6, writer, torch.Generator().manual_seed(0)
    )
    tensor_map = TensorMap([layer])
    places = [tensor_map.extents(ExpertKey(0, e)) for e in range(6)]
    start = places[0][0].offset
    for expert, (extent,) in enumerate(places):
        assert (extent.offset - start, extent.num_bytes) == (expert * 64, 64)
        assert isinstance(extent.moves[0], ByteMove)
    assert tensor_map.total_bytes == 6 * 64
    assert tensor_map.num_experts == 6
    assert [file.name for file in tensor_map.files()] == ["shard0.bin"]


def test_layout_keeps_parameters_on_cache_lines() -> None:
    """Law: parameters start on cache lines, or at their phase after one, and never overlap."""
    shapes = [("a", (3, 5), torch.bfloat16), ("b", (7,), torch.float32), ("c", (1,), torch.float64)]
    plain = ExpertLayout.pack(shapes)
    assert [spec.offset for spec in plain.parameters] == [0, 64, 128]
    assert plain.num_bytes == 192
    assert plain.weight_bytes == 30 + 28 + 8
    phases = [62, 4, 56]
    shifted = ExpertLayout.pack(shapes, phase_bytes=ALIGNMENT_BYTES).at(phases)
    end = 0
    for spec, phase in zip(shifted.parameters, phases, strict=True):
        assert spec.offset % ALIGNMENT_BYTES == phase
        assert spec.offset >= end
        end = spec.offset + spec.num_bytes
    assert end <= shifted.num_bytes
