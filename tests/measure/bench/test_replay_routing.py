"""A replayed trace decides which experts run, in unmodified models and in offloaded ones alike."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import moe_runtime
from moe_runtime.errors import TraceError
from moe_runtime.measure.bench.routing import Routing, read_routings
from moe_runtime.measure.replay_routing import experts_modules, replay_routing
from moe_runtime.trace import Phase, Trace
from tests.tiny_checkpoint import NUM_EXPERTS, NUM_LAYERS, TOP_K, save_mixtral


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixtral(tmp_path_factory.mktemp("mixtral"))


def random_trace(num_rows: int = 7, **fields: Any) -> Trace:
    trace = Routing(name="uniform").rows(
        num_rows=num_rows, num_layers=NUM_LAYERS + 1, num_experts=NUM_EXPERTS, top_k=TOP_K
    )
    assert trace is not None
    return Trace.of({"topk": trace.topk, **fields}, num_experts=NUM_EXPERTS)


def unmodified(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, experts_implementation="eager"
    )
    return model


def spy(model: PreTrainedModel) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """(index, weights) that each layer's experts are called with from here on."""
    seen: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
    for module in experts_modules(model):
        calls: list[tuple[torch.Tensor, torch.Tensor]] = []
        seen.append(calls)
        module.register_forward_pre_hook(
            lambda module, args, calls=calls: calls.append((args[1].clone(), args[2].clone()))
        )
    return seen


def decode(model: PreTrainedModel, num_tokens: int) -> torch.Tensor:
    with torch.no_grad():
        logits = [model(torch.tensor([[token]])).logits for token in range(3, 3 + num_tokens)]
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("is_offloaded", [False, True])
def test_the_experts_that_run_are_exactly_those_of_the_trace(
    folder: Path, is_offloaded: bool
) -> None:
    model = (
        moe_runtime.load(folder, expert_memory=0.5, exact=True)
        if is_offloaded
        else unmodified(folder)
    )
    trace = random_trace()
    with replay_routing(model, trace):
        seen = spy(model)
        decode(model, 9)  # two more than the trace has rows: it starts anew
    for layer, calls in enumerate(seen):
        found = torch.cat([index for index, _ in calls]).numpy()
        assert np.array_equal(found, trace.topk[np.arange(9) % 7, layer])


def test_offloaded_and_unmodified_models_agree_bit_for_bit_under_the_same_trace(
    folder: Path,
) -> None:
    ours, theirs = moe_runtime.load(folder, expert_memory=0.5, exact=True), unmodified(folder)
    own_choice = decode(theirs, 6)
    with replay_routing(ours, random_trace()), replay_routing(theirs, random_trace()):
        found, expected = decode(ours, 6), decode(theirs, 6)
    assert torch.equal(found, expected)
    assert not torch.equal(expected, own_choice)
    assert torch.equal(decode(theirs, 6), own_choice)  # the hooks are gone


def test_rows_of_a_prefill_are_consecutive_and_seek_says_where(folder: Path) -> None:
    model, trace = unmodified(folder), random_trace()
    with replay_routing(model, trace) as replay, torch.no_grad():
        seen = spy(model)
        replay.seek(2)
        model(torch.arange(4)[None])
        model(torch.arange(2)[None])
    first, second = seen[0]
    assert np.array_equal(first[0].numpy(), trace.topk[2:6, 0])
    assert np.array_equal(second[0].numpy(), trace.topk[[6, 0], 0])


def test_weights_of_the_trace_are_used_where_it_has_them(folder: Path) -> None:
    model = unmodified(folder)
    shape = (7, NUM_LAYERS + 1, TOP_K)
    weights = np.random.default_rng(1).random(shape).astype(np.float16)
    with replay_routing(model, random_trace(weights=weights)):
        seen = spy(model)
        decode(model, 7)
    found = torch.cat([given for _, given in seen[1]]).numpy()
    assert np.array_equal(found, weights[:, 1].astype(np.float32))


def test_padding_rows_are_not_replayed(folder: Path) -> None:
    model = unmodified(folder)
    phase = np.full(7, Phase.DECODE, np.uint8)
    phase[0] = Phase.PADDING
    position = np.array([-1, *range(6)], np.int32)
    trace = random_trace(phase=phase, position=position)
    with replay_routing(model, trace):
        seen = spy(model)
        decode(model, 1)
    assert np.array_equal(seen[0][0][0].numpy(), trace.topk[1:2, 0])


def test_a_trace_that_does_not_fit_is_refused_with_a_remedy(folder: Path) -> None:
    model = unmodified(folder)
    with pytest.raises(TraceError, match=r"3 MoE layers and the trace 2; use a model with at most"):
        replay_routing(model, Trace.of({"topk": random_trace().topk[:, :2]})).__enter__()
    wider = Trace.of({"topk": random_trace().topk}, num_experts=8)
    with pytest.raises(TraceError, match="8 experts a layer and the model 6"):
        replay_routing(model, wider).__enter__()
    holes = random_trace().topk.copy()
    holes[3, 1, 1] = -1
    with pytest.raises(TraceError, match="row 3 of the trace lacks experts in layer 1"):
        replay_routing(model, Trace.of({"topk": holes}, num_experts=6)).__enter__()
    narrow = Trace.of({"topk": random_trace().topk[:, :, :1]}, num_experts=6)
    with replay_routing(model, narrow), pytest.raises(TraceError, match="top-1 without weights"):
        decode(model, 1)


def test_routings_are_read_by_name(tmp_path: Path) -> None:
    random_trace().save(tmp_path / "t.npz")
    found = read_routings(f"forced, uniform,trace:{tmp_path / 't.npz'}")
    assert [routing.name for routing in found] == ["forced", "uniform", "trace:t.npz"]
    assert [routing.is_replayed for routing in found] == [False, True, True]
    with pytest.raises(ValueError, match="routing 'mine' is unknown; write forced, uniform or"):
        read_routings("mine")
    with pytest.raises(ValueError, match="names the same routing twice"):
        read_routings("uniform,uniform")
    with pytest.raises(TraceError, match=r"missing\.npz"):
        read_routings("trace:missing.npz")
