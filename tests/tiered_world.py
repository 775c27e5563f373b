"""Experts behind a TieredEngine over fakes, beside the weights that they must equal."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch

from moe_runtime.cache.lfu import LFUPolicy
from moe_runtime.cache.lru import LRUPolicy
from moe_runtime.engine import Weights
from moe_runtime.expert import ExpertKey
from moe_runtime.grouped_experts import GroupedExperts
from moe_runtime.kernels.gate import Gate
from moe_runtime.kernels.launch import is_interpreted
from moe_runtime.kernels.product import product_kernel
from moe_runtime.kernels.scaled_blocks import Dequantizer, TorchDequantizer
from moe_runtime.layer import ExpertMath
from moe_runtime.memory.anonymous_memory import Blob
from moe_runtime.memory.blob_map import BlobMap
from moe_runtime.memory.device_room import DeviceRoom
from moe_runtime.memory.device_slots import DeviceSlots
from moe_runtime.memory.layout import ExpertLayout
from moe_runtime.memory.packed_blob import Unpack
from moe_runtime.memory.packed_landing import PackedLanding
from moe_runtime.memory.pinned_slots import PinnedSlots
from moe_runtime.memory.scaled_map import ScaledMap
from moe_runtime.memory.stream import Streams
from moe_runtime.memory.tensor_map import LayerExperts, TensorMap
from moe_runtime.scheduling.miss_plan import MissWay
from moe_runtime.scheduling.miss_planner import MissPlanner
from moe_runtime.scheduling.prefetch import AheadPlan
from moe_runtime.stored_weights import StoredWeight, stored_weights
from moe_runtime.tiered_engine import TieredEngine
from moe_runtime.tiered_layer import TieredLayers
from moe_runtime.tiered_math import TieredMath
from tests.fake_streams import FakeMachine, FakeSource, FakeStreams
from tests.honest_experts import honest_forward, parameter_shapes, random_math, random_routing
from tests.stored_experts import Form, PackedExperts, cpu_unpack, random_stored, scaled_experts

# T tokens, D model dim

MODEL_DIM, FFN_DIM = 8, 12
STORED_DIM = 32  # of both: what mxfp4 can hold
NUM_LAYERS = 3
# Those of a GPU are in tests/integrations/test_tiers_on_gpu.py.
needs_interpreter = pytest.mark.skipif(
    not is_interpreted(product_kernel), reason="Triton does not compute on CPU tensors here"
)
# Sums of a dozen products of float32 in another order.
TOLERANCE = 1e-5


@dataclass
class Forward:
    """One forward of one layer: inputs, what must come out, and what came."""

    layer: int
    hidden_TD: torch.Tensor
    index_TK: torch.Tensor
    scores_TK: torch.Tensor
    expected_TD: torch.Tensor
    found_TD: torch.Tensor | None = None


@dataclass
class TieredWorld:
    """A small model: `maths[layer]`, `weights[layer][expert]`, and the blobs of the disk.

    `form` is that of the blobs: `weights` are what they stand for.
    """

    rng: random.Random
    dtype: torch.dtype = torch.float32
    form: Form = "plain"
    maths: list[ExpertMath] = field(init=False)
    weights: list[list[Weights]] = field(init=False)
    tensor_map: TensorMap = field(init=False)
    blobs: dict[ExpertKey, Blob] = field(init=False)
    blob_map: BlobMap = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.rng.randrange(2**31))
        self.maths, self.weights, self.blobs, layers = [], [], {}, []
        for _ in range(NUM_LAYERS):
            math, num_experts = random_math(self.rng), self.rng.randint(2, 6)
            shapes = parameter_shapes(math, self.model_dim, self.ffn_dim)
            if self.form in ("plain", "packed"):
                layout = ExpertLayout.pack([(n, s, self.dtype) for n, s in shapes.items()])
                layers.append(LayerExperts(num_experts, layout, {}))
            else:
                layers.append(scaled_experts(math, num_experts, shapes, self.dtype, self.form))
            self.maths.append(math)
        self.tensor_map = TensorMap(layers)
        packed = PackedExperts(self.tensor_map)
        self.blob_map = ScaledMap.of(self.tensor_map) or self.tensor_map
        for layer, experts in enumerate(layers):
            self.weights.append([])
            for key in (ExpertKey(layer, expert) for expert in range(experts.num_experts)):
                blob = random_stored(experts.layout, self.generator)
                layout = self.blob_map.layout(key)
                plain = torch.zeros(layout.num_bytes, dtype=torch.uint8)
                if layout.compact is None:
                    plain = blob
                else:
                    layout.compact.expander(layout.parameters, blob, plain)()
                self.weights[layer].append(layout.views(plain))
                self.blobs[key] = (
                    packed.add(key, plain) if self.form == "packed" else blob
                ).numpy()
        if self.form == "packed":
            self.blob_map = packed

    @property
    def model_dim(self) -> int:
        return MODEL_DIM if self.form == "plain" else STORED_DIM

    @property
    def ffn_dim(self) -> int:
        return FFN_DIM if self.form == "plain" else STORED_DIM

    def device_slots(
        self,
        num_slots: int,
        streams: Streams,
        dequantizer: Dequantizer = TorchDequantizer(),  # noqa: B008 -- it has no state
        unpack: Unpack = cpu_unpack,
    ) -> DeviceSlots:
        """With all that any form needs beside them."""
        host_bytes = max(map(len, self.blobs.values()))
        room_bytes = max(self.blob_map.layout(key).num_bytes for key in self.blobs)
        return DeviceSlots(
            num_slots,
            self.tensor_map.slot_bytes,
            streams,
            room=DeviceRoom(room_bytes, streams, dequantizer),
            landing=PackedLanding(host_bytes, streams, unpack),
        )

    def host_slots(self, num_slots: int, streams: Streams) -> PinnedSlots:
        """With room for one expert as it computes."""
        host_bytes = max(map(len, self.blobs.values()))
        room_bytes = max(self.blob_map.layout(key).num_bytes for key in self.blobs)
        return PinnedSlots(num_slots, host_bytes, streams, room_bytes=room_bytes)

    def torch_maths(self) -> list[TieredMath]:
        """One expert after the other, with the reference's bits; the CPU may take part."""
        return [
            TieredMath(torch_math=math, grouped=None, host=None if math.post_norm else math)
            for math in self.maths
        ]

    def grouped_maths(self, gpu_name: str | None = None) -> list[TieredMath]:
        """Triton's grouped products, interpreted where there is no GPU."""
        return [
            replace(
                tiered,
                grouped=GroupedExperts(
                    math=math,
                    gate=Gate() if math.up_name == "gate_up_proj" else None,
                    num_experts=layer.num_experts,
                    model_dim=self.model_dim,
                    ffn_dim=self.ffn_dim,
                    gpu_name=gpu_name,
                    stored={} if layer.scaled is None else _stored(math, layer),
                ),
            )
            for tiered, math, layer in zip(
                self.torch_maths(), self.maths, self.tensor_map.layers, strict=True
            )
        ]

    def random_key(self) -> ExpertKey:
        """Any expert of any layer."""
        return self.rng.choice(list(self.blobs))

    def forward(self, max_tokens: int = 12) -> Forward:
        """Random inputs of a random layer."""
        rng, layer = self.rng, self.rng.randrange(NUM_LAYERS)
        num_tokens = rng.choice([1, 1, rng.randint(1, max_tokens)])
        weights = self.weights[layer]
        hidden_TD = torch.randn(num_tokens, self.model_dim, generator=self.generator).to(self.dtype)
        index_TK, scores_TK = random_routing(rng, self.generator, num_tokens, len(weights))
        # Rows that a token has twice of one expert are added up in float32 by the reference.
        while self.dtype != torch.float32 and _has_repeats(index_TK, len(weights)):
            index_TK, scores_TK = random_routing(rng, self.generator, num_tokens, len(weights))
        expected_TD = honest_forward(self.maths[layer], weights, hidden_TD, index_TK, scores_TK)
        return Forward(layer, hidden_TD, index_TK, scores_TK, expected_TD)


def _has_repeats(index_TK: torch.Tensor, num_experts: int) -> bool:
    rows = [[expert for expert in row if expert < num_experts] for row in index_TK.tolist()]
    return any(len(set(row)) < len(row) for row in rows)


def _stored(math: ExpertMath, layer: LayerExperts) -> dict[str, StoredWeight]:
    found = stored_weights(math, layer)
    assert not isinstance(found, str), found
    return found


class Running:
    """An engine over a world and fakes."""

    def __init__(
        self,
        world: TieredWorld,
        *,
        num_slots: int,
        num_host_slots: int,
        way: MissWay = MissWay.COPY,
        policy: Callable[[], LRUPolicy | LFUPolicy] = LRUPolicy,
        maths: Sequence[TieredMath] | None = None,
    ) -> None:
        self.world = world
        self.maths = world.torch_maths() if maths is None else maths
        self.machine = FakeMachine(world.rng)
        self.streams = FakeStreams(self.machine)
        self.source = FakeSource(self.machine, world.blobs)
        self.engine = TieredEngine(
            world.tensor_map,
            self.streams,
            self.source,
            world.device_slots(num_slots, self.streams),
            world.host_slots(num_host_slots, self.streams),
            policy(),
            MissPlanner(way),
            blobs=world.blob_map,
            poison=True,
        )
        self.layers = TieredLayers(self.engine)

    def run(self, forward: Forward) -> None:
        """Queue one forward; its output is there once the machine is idle."""
        forward.found_TD = self.layers.run(
            forward.layer,
            self.maths[forward.layer],
            forward.hidden_TD,
            forward.index_TK,
            forward.scores_TK,
        )

    def read_ahead(self, keys: Sequence[ExpertKey]) -> None:
        """Bring those of `keys` that the device lacks a tier closer, as far as tiers are idle."""
        absent = [key for key in dict.fromkeys(keys) if key not in self.engine.cache]
        plan = AheadPlan(absent, len(absent), lambda key, victim: True)
        self.engine.ahead.read_ahead(plan)

    def check(self, forward: Forward) -> None:
        """Wait for all that is queued, and compare: bits, or what a kernel of float32 promises."""
        self.streams.synchronize()
        found_TD, expected_TD = forward.found_TD, forward.expected_TD
        assert found_TD is not None
        if self.maths[forward.layer].grouped is None:
            assert torch.equal(found_TD, expected_TD), forward
        else:
            torch.testing.assert_close(found_TD, expected_TD, atol=TOLERANCE, rtol=TOLERANCE)
