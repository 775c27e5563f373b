"""Laws of a model whose experts travel through tiers, over a fake accelerator."""

import random
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import moe_runtime
from moe_runtime.errors import BudgetError
from moe_runtime.expert_memory import ExpertMemory
from moe_runtime.integrations.transformers import install, tiered_maths
from moe_runtime.integrations.transformers.budget import Budget, SlotKind
from moe_runtime.integrations.transformers.device_tiers import (
    TierSettings,
    build_tiers,
    plan_host_slots,
)
from tests.fake_streams import FakeMachine, FakeSource, FakeStreams
from tests.fake_tiers import PLENTY_BYTES
from tests.tiered_world import TieredWorld, needs_interpreter
from tests.tiny_models import SIZES, experts_modules, logits_of, prompt, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.*expert slots are fewer")
# Kernels of float32 add up in another order than torch does, a dozen times over.
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
WORLD = TieredWorld(random.Random(0))
SLOT_BYTES = WORLD.tensor_map.slot_bytes
NUM_EXPERTS = WORLD.tensor_map.num_experts


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that Triton does not know: torch computes each expert."""
    monkeypatch.setattr(tiered_maths, "find_grouped", lambda *_: "the test says no")


@pytest.mark.usefixtures("no_triton")
@pytest.mark.filterwarnings("ignore:host_memory and miss have no effect")
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("miss", ["auto", "copy", "cpu"])
@pytest.mark.parametrize("expert_memory", ["40%", "100%"])
def test_same_logits(machine: FakeMachine, model_type: str, miss: str, expert_memory: str) -> None:
    """Law: logits are those of the model without tiers, whichever way misses go."""
    model, ids = tiny_model(model_type), prompt(2, 12)
    expected = logits_of(model, ids)
    with moe_runtime.offload(model, expert_memory, host_memory="60%", miss=miss) as handle:
        for _ in range(3):
            torch.testing.assert_close(logits_of(model, ids), expected, **CLOSE)
        tiers = handle.report()["tiers"]
        settings = handle.report()["settings"]
    assert tiers["miss"] == miss
    assert tiers["syncs_per_layer"] <= 1
    assert settings["experts"].startswith("torch (the test says no); on the CPU ")
    if settings["holds_all_experts"]:
        assert tiers["misses_computed"] == 0
    elif miss == "copy":
        assert tiers["bytes_copied"] > 0
        assert tiers["misses_computed"] == 0
    elif miss == "cpu":
        assert tiers["misses_copied"] == 0
        assert tiers["misses_computed"] > 0
    else:
        assert tiers["misses_computed"] > 0
        assert tiers["misses_copied"] > 0
    torch.testing.assert_close(logits_of(model, ids), expected)  # restored
    assert machine.is_idle


@needs_interpreter
@pytest.mark.filterwarnings("ignore:host_memory and miss have no effect")
@pytest.mark.parametrize(
    ("model_type", "expert_memory", "miss"),
    [("mixtral", "40%", "auto"), ("mixtral", "100%", "auto"), ("gpt_oss", "40%", "copy")],
)
def test_grouped_products_of_offloaded_experts(
    machine: FakeMachine, model_type: str, expert_memory: str, miss: str
) -> None:
    """Law: Triton computes from slots, also transposed, interleaved, clamped and with biases."""
    experts = next(iter(experts_modules(tiny_model(model_type)).values()))
    hidden_TD = torch.randn(2, SIZES["hidden_size"])
    index_TK, scores_TK = torch.tensor([[3, 0], [5, 3]]), torch.rand(2, 2)
    with torch.no_grad():
        expected = experts(hidden_TD, index_TK, scores_TK)
    holder = nn.ModuleDict({"experts": experts}).eval()
    with moe_runtime.offload(holder, expert_memory, miss=miss) as handle:
        found = experts(hidden_TD, index_TK, scores_TK)
        report = handle.report()
    torch.testing.assert_close(found, expected, **CLOSE)
    assert report["settings"]["experts"].split(";")[0] == "triton"
    if expert_memory == "100%":
        assert report["tiers"]["syncs"] == machine.num_waits == 0
        # Of routing that the host never waited for, behind the reads of every expert.
        assert (report["cache"]["hits"], report["cache"]["misses"]) == (3, SIZES["num_experts"])
    else:
        assert report["tiers"]["syncs"] == 1


@pytest.mark.filterwarnings("ignore:host_memory and miss have no effect")
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact(machine: FakeMachine, model_type: str, dtype: torch.dtype) -> None:
    """Law: exact=True has the bits of the unmodified model, and the CPU computes no expert."""
    model, ids = tiny_model(model_type).to(dtype), prompt(2, 12)
    expected = logits_of(model, ids)
    with moe_runtime.offload(model, "40%", miss="auto", exact=True) as handle:
        for _ in range(3):
            assert torch.equal(logits_of(model, ids), expected)
        report = handle.report()
    assert report["settings"]["experts"] == "torch"
    assert report["tiers"]["misses_copied"] > report["tiers"]["misses_computed"] == 0
    assert machine.is_idle


@pytest.mark.usefixtures("no_triton")
@pytest.mark.filterwarnings("ignore:host_memory and miss have no effect")
def test_a_loaded_model(machine: FakeMachine, checkpoint: Callable[[str], Path]) -> None:
    """Law: load() gives the unmodified model's logits, and its report counts what travelled."""
    folder, ids = checkpoint("mixtral"), prompt(1, 6)
    eager = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    model = moe_runtime.load(folder, expert_memory="40%", miss="copy")
    handle = moe_runtime.handle(model)
    torch.testing.assert_close(logits_of(model, ids), logits_of(eager, ids), **CLOSE)
    report = handle.report()
    slot_bytes = report["cache"]["slot_bytes"]
    assert report["tiers"]["bytes_copied"] <= report["cache"]["misses"] * slot_bytes
    assert report["tiers"]["misses_copied"] == report["cache"]["misses"] > 0
    assert "in pinned host memory" in handle.placement()
    handle.close()
    assert machine.is_idle


def settings(host_memory: str = "auto", *, may_shrink: bool = False) -> TierSettings:
    return TierSettings.parse(host_memory, "copy", may_shrink=may_shrink, exact=False)


def budget_of(num_slots: int) -> Budget:
    return Budget(
        num_slots,
        SlotKind("unpacked", SLOT_BYTES),
        num_slots * SLOT_BYTES,
        2,
        2 * SLOT_BYTES,
        NUM_EXPERTS * SLOT_BYTES,
        NUM_EXPERTS,
    )


def build(streams: FakeStreams, tiers: TierSettings, num_slots: int = 6) -> tuple[object, Budget]:
    return build_tiers(
        WORLD.tensor_map,
        budget_of(num_slots),
        tiers,
        install.make_policy("lru", WORLD.tensor_map),
        streams,
        FakeSource(streams.machine, WORLD.blobs),
        available_host_bytes=PLENTY_BYTES,
    )


def eager_streams(**kwargs: object) -> FakeStreams:
    return FakeStreams(FakeMachine(random.Random(0), is_eager=True), **kwargs)  # type: ignore[arg-type]


def test_refused_pinning_warns_once() -> None:
    """Law: without pinned memory the model runs, and one warning says what it costs."""
    with pytest.warns(
        UserWarning, match=r"not be pinned \(the test says no\).*ulimit -l"
    ) as caught:
        build(eager_streams(can_pin=False), settings())
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(eager_streams(), settings())


def test_too_little_device_memory() -> None:
    """Law: the error says what was asked, what is free and what would fit; 'auto' shrinks."""
    reserve = 512 * 2**20
    streams = eager_streams(num_bytes=reserve + 4 * SLOT_BYTES)
    big = 2**29 // SLOT_BYTES + 9
    with pytest.raises(BudgetError, match=r"MiB are free, which has room for 4 beside") as caught:
        build(streams, settings(), num_slots=big)
    assert f"expert_memory={4 * SLOT_BYTES} or less" in str(caught.value)
    assert build(streams, settings(may_shrink=True), num_slots=big)[1].num_slots == 4
    streams = eager_streams(num_bytes=1000)
    with pytest.raises(BudgetError, match=r"too little for the 2 experts that one token uses"):
        build(streams, settings(may_shrink=True))


@pytest.mark.parametrize(
    ("written", "available_slots", "num_device_slots", "num_slots"),
    [
        ("auto", 10**6, 4, NUM_EXPERTS),
        ("auto", 10**6, NUM_EXPERTS, 16 if NUM_EXPERTS > 16 else NUM_EXPERTS),
        ("50%", 10**6, NUM_EXPERTS, NUM_EXPERTS // 2),
        (f"{5 * SLOT_BYTES}B", 10**6, 4, 5),
    ],
)
def test_host_slots(
    written: str, available_slots: int, num_device_slots: int, num_slots: int
) -> None:
    """Law: all experts if they fit, what was asked, or little where the device holds them all."""
    available = 2**31 + available_slots * SLOT_BYTES
    found = plan_host_slots(
        ExpertMemory.parse(written), WORLD.tensor_map, budget_of(num_device_slots), available
    )
    assert found == num_slots


@pytest.mark.parametrize(
    ("written", "available_bytes", "message"),
    [
        ("auto", 2**30, "below the floor of .* what one token uses in one layer; set host_memory="),
        (1, 2**40, r"below the floor of .*; set host_memory=\d+ or more"),
        ("100%", SLOT_BYTES, "of host memory for experts do not fit in the .* that are free"),
    ],
)
def test_host_memory_that_cannot_be(written: str | int, available_bytes: int, message: str) -> None:
    """Law: too little and too much are refused, with the remedy."""
    with pytest.raises(BudgetError, match=message):
        plan_host_slots(
            ExpertMemory.parse(written), WORLD.tensor_map, budget_of(4), available_bytes
        )


@pytest.mark.parametrize(
    ("host_memory", "miss", "error", "message"),
    [
        ("lots", "auto", BudgetError, "host_memory 'lots' is not a size"),
        ("auto", "maybe", ValueError, "miss 'maybe' is unknown; choose from auto, copy, cpu"),
    ],
)
def test_nonsense_is_refused(
    host_memory: str, miss: str, error: type[Exception], message: str
) -> None:
    """Law: settings that mean nothing are quoted, with what may be written."""
    with pytest.raises(error, match=message):
        moe_runtime.load("nowhere", host_memory=host_memory, miss=miss)


def test_exact_does_not_go_with_the_cpu() -> None:
    """Law: the CPU's rounding is not the GPU's, so miss='cpu' refuses exact, in one line."""
    with pytest.raises(ValueError, match=r"miss='cpu' lets the CPU .* leave out one of them"):
        moe_runtime.load("nowhere", miss="cpu", exact=True)


def test_settings_without_effect_are_said(checkpoint: Callable[[str], Path]) -> None:
    """Law: on the CPU host_memory and miss do nothing, and one warning says so."""
    with pytest.warns(UserWarning, match="host_memory and miss have no effect on the CPU"):
        model = moe_runtime.load(checkpoint("mixtral"), device_map="cpu", miss="copy")
    moe_runtime.handle(model).close()
