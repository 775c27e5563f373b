"""Laws of the tiers on a real GPU: the schedules of the fake, on CUDA's streams."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import moe_runtime
from moe_runtime.cache.lru import LRUPolicy
from moe_runtime.kernels.dequant import TritonDequantizer
from moe_runtime.kernels.launch import FP8_CAPABILITY, LEAST_CAPABILITY
from moe_runtime.kernels.unpack import unpack_into
from moe_runtime.memory.cuda_streams import CudaStreams
from moe_runtime.memory.device_slots import DeviceSlots
from moe_runtime.memory.pinned_memory import PinnedMemory
from moe_runtime.memory.pinned_slots import PinnedSlots
from moe_runtime.scheduling.miss_plan import MissWay
from moe_runtime.scheduling.miss_planner import MissPlanner
from moe_runtime.scheduling.prefetch import AheadPlan
from moe_runtime.tiered_engine import TieredEngine
from moe_runtime.tiered_layer import TieredLayers
from tests.fake_streams import FakeMachine, FakeSource
from tests.quantised_checkpoints import load_dequantised, save_fp8, save_mxfp4
from tests.stored_experts import Form
from tests.tiered_world import TieredWorld

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# float32 sums of a dozen products in another order, without tensor cores.
TOLERANCE = 1e-4
# bf16 rounds h and the output of an expert, here of the order of 10, once each.
BF16_TOLERANCE = 0.25


@pytest.mark.parametrize("way", MissWay)
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_schedules(way: MissWay, share: float) -> None:
    """Law: every expert computes with its bytes, on poisoned slots; one sync a layer at most."""
    torch.backends.cuda.matmul.allow_tf32 = False
    for seed in range(20):
        world = TieredWorld(random.Random(seed))
        streams = CudaStreams(torch.device("cuda"))
        machine = FakeMachine(world.rng, is_eager=True)
        most, slot_bytes = world.tensor_map.num_experts, world.tensor_map.slot_bytes
        engine = TieredEngine(
            world.tensor_map,
            streams,
            FakeSource(machine, world.blobs),
            DeviceSlots(max(2, int(share * most)), slot_bytes, streams),
            PinnedSlots(most, slot_bytes, streams),
            LRUPolicy(),
            MissPlanner(way),
            poison=True,
        )
        layers, maths = TieredLayers(engine), world.grouped_maths(torch.cuda.get_device_name())
        for _ in range(20):
            forward = world.forward()
            engine.ahead.read_ahead(AheadPlan([world.random_key()], 1, lambda key, victim: True))
            found = layers.run(
                forward.layer,
                maths[forward.layer],
                forward.hidden_TD.cuda(),
                forward.index_TK.cuda(),
                forward.scores_TK.cuda(),
            )
            torch.testing.assert_close(
                found.cpu(), forward.expected_TD, atol=TOLERANCE, rtol=TOLERANCE
            )
        engine.close()


@pytest.mark.parametrize("form", ["fp8", "mxfp4", "packed"])
@pytest.mark.parametrize("is_grouped", [True, False])
def test_schedules_of_stored_experts(form: Form, is_grouped: bool) -> None:
    """Law: the same where slots hold experts quantised, or the link carries them packed."""
    torch.backends.cuda.matmul.allow_tf32 = False
    needed = FP8_CAPABILITY if form == "fp8" else LEAST_CAPABILITY
    if torch.cuda.get_device_capability() < needed:
        pytest.skip(f"{form} needs compute capability {needed}")
    for seed in range(10):
        # Packed weights are bf16: their products are compared with tensor cores' in mind.
        dtype = torch.bfloat16 if form == "packed" else torch.float32
        world = TieredWorld(random.Random(seed), dtype, form)
        streams, most = CudaStreams(torch.device("cuda")), world.tensor_map.num_experts
        engine = TieredEngine(
            world.tensor_map,
            streams,
            FakeSource(FakeMachine(world.rng, is_eager=True), world.blobs),
            world.device_slots(max(2, most // 2), streams, TritonDequantizer(), unpack_into),
            world.host_slots(most, streams),
            LRUPolicy(),
            MissPlanner(MissWay.AUTO),
            blobs=world.blob_map,
            poison=True,
        )
        name = torch.cuda.get_device_name()
        layers = TieredLayers(engine)
        maths = world.grouped_maths(name) if is_grouped else world.torch_maths()
        for _ in range(20):
            forward = world.forward()
            engine.prefetch([world.random_key()])
            inputs = (forward.hidden_TD, forward.index_TK, forward.scores_TK)
            found = layers.run(forward.layer, maths[forward.layer], *(t.cuda() for t in inputs))
            error = TOLERANCE if dtype == torch.float32 else BF16_TOLERANCE
            torch.testing.assert_close(found.cpu(), forward.expected_TD, atol=error, rtol=error)
        engine.close()


@pytest.mark.filterwarnings("ignore:.*expert slots are fewer")
@pytest.mark.parametrize("save", [save_fp8, save_mxfp4])
@pytest.mark.parametrize(
    ("miss", "exact"), [("auto", False), ("copy", False), ("cpu", False), ("copy", True)]
)
def test_greedy_tokens_of_stored_experts(
    save: Callable[[Path], Path], miss: str, exact: bool, tmp_path: Path
) -> None:
    """Law: greedy tokens in float32 are those of transformers' dequantised model."""
    folder, ids = save(tmp_path / "model"), torch.arange(1, 13, device="cuda").unsqueeze(0)
    wanted = {"max_new_tokens": 12, "do_sample": False}
    expected = load_dequantised(folder, torch.float32).cuda().generate(ids, **wanted)
    model = moe_runtime.load(
        folder, expert_memory="40%", miss=miss, exact=exact, dtype=torch.float32, warm_start=False
    )
    assert model.device.type == "cuda"
    assert torch.equal(model.generate(ids, **wanted), expected)
    moe_runtime.handle(model).close()


def test_resident_layers_never_wait() -> None:
    """Law: where the device holds every expert, nothing that a layer calls waits for it."""
    world = TieredWorld(random.Random(0))
    streams = CudaStreams(torch.device("cuda"))
    most, slot_bytes = world.tensor_map.num_experts, world.tensor_map.slot_bytes
    engine = TieredEngine(
        world.tensor_map,
        streams,
        FakeSource(FakeMachine(world.rng, is_eager=True), world.blobs),
        DeviceSlots(most, slot_bytes, streams),
        PinnedSlots(most, slot_bytes, streams),
        LRUPolicy(),
        MissPlanner(MissWay.AUTO),
    )
    engine.fill()
    layers, maths = TieredLayers(engine), world.grouped_maths(torch.cuda.get_device_name())
    forwards = [world.forward() for _ in range(10)]
    inputs = [[t.cuda() for t in (f.hidden_TD, f.index_TK, f.scores_TK)] for f in forwards]
    for forward, tensors in zip(forwards, inputs, strict=True):  # compiles
        layers.run(forward.layer, maths[forward.layer], *tensors)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [
            layers.run(forward.layer, maths[forward.layer], *tensors)
            for forward, tensors in zip(forwards, inputs, strict=True)
        ]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert engine.counts.num_syncs == 0
    for forward, output_TD in zip(forwards, found, strict=True):
        torch.testing.assert_close(
            output_TD.cpu(), forward.expected_TD, atol=TOLERANCE, rtol=TOLERANCE
        )
    engine.close()


def test_memory_is_pinned_in_place() -> None:
    """Law: torch sees registered memory as pinned, and as pageable once it is let go."""
    streams = CudaStreams(torch.device("cuda"))
    memory = PinnedMemory(2**20, streams)
    kept = memory.bytes
    assert memory.refusal is None
    assert kept.is_pinned()
    memory.close()
    assert not kept.is_pinned()


@pytest.mark.filterwarnings("ignore:.*expert slots are fewer")
@pytest.mark.parametrize(
    ("miss", "exact"), [("auto", False), ("copy", False), ("cpu", False), ("copy", True)]
)
def test_greedy_tokens(miss: str, exact: bool, checkpoint: Callable[[str], Path]) -> None:
    """Law: greedy tokens in float32 are those of the unmodified model on the same GPU."""
    from transformers import AutoModelForCausalLM

    folder = checkpoint("mixtral")
    ids = torch.arange(1, 13, device="cuda").unsqueeze(0)
    wanted = {"max_new_tokens": 12, "do_sample": False}
    reference = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").cuda()
    expected = reference.generate(ids, **wanted)
    model = moe_runtime.load(folder, expert_memory="40%", miss=miss, exact=exact)
    assert model.device.type == "cuda"
    assert torch.equal(model.generate(ids, **wanted), expected)
    moe_runtime.handle(model).close()
