"""Quantised experts reach their slots as they are stored, however a checkpoint arranges them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moe_runtime.errors import CheckpointError
from moe_runtime.expert import ExpertKey
from moe_runtime.kernels.scaled_blocks import ScaledWeights, TorchDequantizer
from moe_runtime.memory.assembly import Assembly, concatenate, stack
from moe_runtime.memory.compact_slots import CompactSlots
from moe_runtime.memory.disk import DiskReader
from moe_runtime.memory.expert_load import ExpertLoad
from moe_runtime.memory.safetensors_header import read_header
from moe_runtime.memory.scaled_layer import scaled_layer
from moe_runtime.memory.scaled_map import ScaledMap
from moe_runtime.memory.scaled_tensor import ScaledTensor
from moe_runtime.memory.tensor_map import LayerExperts, TensorMap

E, N, K = 3, 200, 160
BF16 = torch.bfloat16
PHASE = 16


class Checkpoint:
    """fp8 weights of E experts in a file of their own, one by one and fused, and plain ones."""

    def __init__(self, folder: Path) -> None:
        generator = torch.Generator().manual_seed(0)
        self.values = torch.randn(2, E, N, K, generator=generator).to(torch.float8_e4m3fn)
        self.scales = torch.rand(2, E, 2, 2, generator=generator) + 0.5
        self.plain = torch.randn(E, 24, 8, generator=generator).to(BF16)
        tensors = {"plain": self.plain, "fused": self.values[0], "fused_scale_inv": self.scales[0]}
        for which in range(2):
            for e in range(E):
                tensors[f"{which}.{e}"] = self.values[which, e].clone()
                # bfloat16 as some checkpoints have them: exact, and of another size
                scales = self.scales[which, e].to(BF16 if which else torch.float32)
                tensors[f"{which}.{e}_scale_inv"] = scales.clone()
        save_file(tensors, folder / "model.safetensors")
        self.places = read_header(folder / "model.safetensors")

    def one(self, name: str) -> Assembly:
        return Assembly.of(ScaledTensor.fp8(self.places[name], self.places[f"{name}_scale_inv"]))

    def all(self, which: int) -> Assembly:
        return stack([self.one(f"{which}.{e}") for e in range(E)], 0)

    def dense(self, which: int, expert: int) -> torch.Tensor:
        """Expert `expert` of the weights `which` in bfloat16."""
        found = torch.empty(N, K, dtype=BF16)
        scales = self.scales[which, expert].to(BF16 if which else torch.float32)
        weights = ScaledWeights(format="fp8", values=self.values[which, expert], scales=scales)
        TorchDequantizer().run(weights, found)
        return found


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return Checkpoint(tmp_path)


def layer_of(checkpoint: Checkpoint, weight: Assembly) -> LayerExperts:
    parameters = [("weight", weight.shape[1:], BF16), ("plain", (24, 8), BF16)]
    places = {"weight": weight, "plain": Assembly.of(checkpoint.places["plain"])}
    phases = {"weight": [e * 32 % 64 for e in range(E)], "plain": [PHASE] * E}
    return scaled_layer(E, parameters, places, phases)


def read(layer: LayerExperts, expert: int) -> dict[str, torch.Tensor]:
    """The views of one expert that was read into the second of two slots."""
    tensor_map = TensorMap([layer])
    blobs = ScaledMap.of(tensor_map)
    assert blobs is not None
    slots = CompactSlots(2, blobs.slot_bytes, blobs.computed_bytes)
    slots.poison(1)
    reader = DiskReader(tensor_map.files())
    key, load = ExpertKey(0, expert), ExpertLoad()
    reader.submit(blobs.extents(key), blobs.layout(key), slots.blob(1), load)
    load.wait()
    found = slots.views(1, blobs.layout(key))
    reader.close()
    assert found["weight"].data_ptr() % 64 == expert * 32 % 64
    assert found["plain"].data_ptr() % 64 == PHASE
    return found


@pytest.mark.parametrize("expert", range(E))
def test_every_arrangement(checkpoint: Checkpoint, expert: int) -> None:
    """Law: one by one, fused, transposed or joined, an expert's weights are the stored ones."""
    both = torch.cat([checkpoint.dense(0, expert), checkpoint.dense(1, expert)])
    arrangements = {
        "one by one": (checkpoint.all(0), checkpoint.dense(0, expert)),
        "bfloat16 scales": (checkpoint.all(1), checkpoint.dense(1, expert)),
        "fused": (checkpoint.one("fused"), checkpoint.dense(0, expert)),
        "transposed": (checkpoint.all(0).transpose(1, 2), checkpoint.dense(0, expert).mT),
        "joined": (concatenate([checkpoint.all(0), checkpoint.all(1)], 1), both),
        "joined, transposed": (
            concatenate([checkpoint.all(0), checkpoint.all(1)], 1).transpose(1, 2),
            both.mT,
        ),
    }
    for name, (weight, expected) in arrangements.items():
        found = read(layer_of(checkpoint, weight), expert)
        assert torch.equal(found["weight"], expected), name
        assert torch.equal(found["plain"], checkpoint.plain[expert]), name


def test_what_a_kernel_can_read_in_place(checkpoint: Checkpoint) -> None:
    """Law: whole rows of outputs with scales in float32, whichever way round the model has them."""
    joined = concatenate([checkpoint.all(0), checkpoint.all(0)], 1)
    beside = concatenate([checkpoint.all(0), checkpoint.all(0)], 2)
    cases = {
        "one by one": (checkpoint.all(0), True, False),
        "joined": (joined, True, False),
        "transposed": (checkpoint.all(0).transpose(1, 2), False, True),
        "joined, transposed": (joined.transpose(1, 2), False, True),
        "columns beside columns": (beside, False, False),
        "bfloat16 scales": (checkpoint.all(1), False, False),
    }
    for name, (weight, plainly, transposed) in cases.items():
        layer = scaled_layer(E, [("weight", weight.shape[1:], BF16)], {"weight": weight}, {})
        assert layer.has_rows(is_transposed=False) is plainly, name
        assert layer.has_rows(is_transposed=True) is transposed, name
    in_float32 = scaled_layer(
        E, [("weight", joined.shape[1:], torch.float32)], {"weight": joined}, {}
    )
    assert not in_float32.has_rows(is_transposed=False)


def test_a_slot_holds_stored_bytes(checkpoint: Checkpoint) -> None:
    layer = layer_of(checkpoint, checkpoint.all(0))
    assert layer.layout.weight_bytes == N * K + 4 * 4 + 24 * 8 * 2
    assert layer.computed.weight_bytes == N * K * 2 + 24 * 8 * 2
    assert TensorMap([layer]).formats() == ["fp8"]
    assert TensorMap([layer]).dtype == BF16


def test_weights_that_are_taken_apart_are_refused(checkpoint: Checkpoint) -> None:
    """Law: a conversion that cuts or rearranges blocks is named, with the tensor and its file."""
    for cut in (checkpoint.all(0).narrow(1, 8, 64), checkpoint.all(0).narrow(2, 0, 128)):
        with pytest.raises(CheckpointError, match=r"takes 0.0 \(F8_E4M3 .* apart"):
            layer_of(checkpoint, cut)


def test_half_quantised_experts_are_refused(checkpoint: Checkpoint) -> None:
    """Law: a weight of which one row is stored otherwise is named."""
    padded = concatenate([checkpoint.all(0), stack([_plain(checkpoint)] * E, 0)], 1)
    with pytest.raises(CheckpointError, match="partly quantised and partly not"):
        layer_of(checkpoint, padded)


def _plain(checkpoint: Checkpoint) -> Assembly:
    """`[1, K]` of numbers that are not quantised."""
    flat = Assembly.of(checkpoint.places["plain"]).merge_dims(0).merge_dims(0)
    return flat.narrow(0, 0, K).unsqueeze(0)


def test_misuse_of_the_formats_is_refused(checkpoint: Checkpoint) -> None:
    """Law: values of another dtype or shape never become a ScaledTensor."""
    places = checkpoint.places
    with pytest.raises(CheckpointError, match="should be F8_E4M3"):
        ScaledTensor.fp8(places["plain"], places["fused_scale_inv"])
    with pytest.raises(CheckpointError, match=r"must be F32 \[3, 2, 2\]"):
        ScaledTensor.fp8(places["fused"], places["0.0_scale_inv"])
    with pytest.raises(CheckpointError, match="must be U8"):
        ScaledTensor.mxfp4("name", places["fused"], places["fused_scale_inv"])
