"""What the recorder writes is what the experts of every family were given."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MixtralForCausalLM, PreTrainedModel

import moe_runtime
from moe_runtime.errors import UnsupportedModelError
from moe_runtime.measure.routing_recorder import RoutingRecorder
from moe_runtime.trace import Phase, Trace
from moe_runtime.trace_writer import TraceWriter
from tests.tiny_models import experts_modules, families, logits_of, prompt, tiny_model

NUM_NEW = 4
NUM_HIDDEN = 3  # tokens that the mask hides in the first row of a batch
PAD = 1

Seen = list[list[tuple[torch.Tensor, torch.Tensor]]]  # by layer, then forward: ids and weights


def record(model: PreTrainedModel, file: Path, **settings: Any) -> Trace:
    """A batch of two prompts, the first padded on the left, and what is decoded after them."""
    with (
        TraceWriter(file) as writer,
        RoutingRecorder(model, writer, name="tiny", **settings),
    ):
        generate(model)
    return Trace.load(file)


def generate(model: PreTrainedModel, **settings: Any) -> torch.Tensor:
    """Both prompts and `NUM_NEW` tokens after them, or fewer if `settings` end a sequence."""
    ids = prompt()
    mask = torch.ones_like(ids)
    mask[0, :NUM_HIDDEN] = 0
    defaults = {"min_new_tokens": NUM_NEW}
    tokens: torch.Tensor = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NUM_NEW,
        do_sample=False,
        pad_token_id=PAD,
        **(settings or defaults),
    )
    return tokens


def watch(model: PreTrainedModel) -> tuple[Seen, list[Any]]:
    """Hooks of the test's own on the experts."""
    modules = list(experts_modules(model).values())
    seen: Seen = [[] for _ in modules]
    hooks = [
        module.register_forward_pre_hook(
            lambda _, arguments, layer=layer: seen[layer].append(
                (arguments[1].clone(), arguments[2].clone())
            )
        )
        for layer, module in enumerate(modules)
    ]
    return seen, hooks


@pytest.mark.parametrize("model_type", families())
def test_every_family_is_recorded_as_it_ran(model_type: str, tmp_path: Path) -> None:
    """Law: the trace holds the ids and weights that each layer got, and whose they were."""
    model = tiny_model(model_type)
    expected_tokens = generate(model)
    seen, hooks = watch(model)
    trace = record(model, tmp_path / "t.npz", hidden=True)
    for hook in hooks:
        hook.remove()
    assert torch.equal(generate(model), expected_tokens)
    check_rows(trace, expected_tokens)
    assert trace.num_steps == NUM_NEW
    assert trace.num_layers == len(seen)
    for layer, forwards in enumerate(seen):
        for step, (ids, weights) in enumerate(forwards):
            rows = trace.step == step
            order = torch.argsort(weights.float(), dim=1, descending=True, stable=True)
            ids, weights = ids.gather(1, order).numpy(), weights.gather(1, order).numpy()
            np.testing.assert_array_equal(trace.topk[rows, layer], ids)
            np.testing.assert_array_equal(
                trace.weights[rows, layer],
                weights.astype(np.float16),  # type: ignore[index]
            )
    assert trace.hidden is not None
    assert trace.hidden.shape[:2] == trace.topk.shape[:2]
    assert trace.num_hidden_layers == model.config.get_text_config().num_hidden_layers


def check_rows(trace: Trace, tokens: torch.Tensor) -> None:
    """The batch of `generate`: `tokens` is its `[2, S]` output, of which the last is never run."""
    num_prompt = tokens.shape[1] - NUM_NEW
    assert trace.token_id is not None
    for row in range(2):
        mine = trace.sequence_id == row
        np.testing.assert_array_equal(trace.token_id[mine], tokens[row, :-1].numpy())
        num_hidden = NUM_HIDDEN if row == 0 else 0
        count = np.arange(tokens.shape[1] - 1 - num_hidden)
        np.testing.assert_array_equal(trace.position[mine], [*[-1] * num_hidden, *count])
        phases = [Phase.PADDING] * num_hidden + [Phase.PREFILL] * (num_prompt - num_hidden)
        phases += [Phase.DECODE] * (NUM_NEW - 1)
        np.testing.assert_array_equal(trace.phase[mine], phases)
    assert (np.diff(trace.step) >= 0).all()


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "deepseek_v3", "nemotron_h"])
def test_an_offloaded_model_gives_the_same_trace(model_type: str, tmp_path: Path) -> None:
    """Law: a trace does not tell whether the experts were in memory."""
    model = tiny_model(model_type)
    resident = record(model, tmp_path / "resident.npz", hidden=True)
    with moe_runtime.offload(model, expert_memory="50%", exact=True):
        offloaded = record(model, tmp_path / "offloaded.npz", hidden=True)
    for name, array in resident.arrays().items():
        np.testing.assert_array_equal(getattr(offloaded, name), array, err_msg=name)
    assert offloaded.layer_ids == resident.layer_ids


def test_without_a_recorder_there_are_no_hooks(tmp_path: Path) -> None:
    """Law: recording costs nothing when it is off."""
    model = tiny_model("mixtral")
    record(model, tmp_path / "t.npz", hidden=True)
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


def test_layers_keep_their_number_in_the_model(tmp_path: Path) -> None:
    """Law: layer_ids names the decoder layers that hold experts, not the dense ones."""
    model = tiny_model("deepseek_v3")
    trace = record(model, tmp_path / "t.npz")
    names = list(experts_modules(model))
    assert trace.layer_ids == tuple(int(name.split(".")[2]) for name in names)
    assert trace.layer_ids[0] == 1


def test_hidden_is_what_the_router_saw(tmp_path: Path) -> None:
    """Law: hidden holds the router's inputs; values beyond float16 become its largest."""
    model = tiny_model("gemma4_text")  # its router sees something else than its experts
    seen: list[torch.Tensor] = []
    routers = [layer.router for layer in model.model.layers]
    with torch.no_grad():
        model.model.embed_tokens.weight[8:].mul_(1e6)
    hooks = [r.register_forward_pre_hook(lambda _, a: seen.append(a[0].clone())) for r in routers]
    with (
        TraceWriter(tmp_path / "t.npz") as writer,
        RoutingRecorder(model, writer, name="tiny", hidden=True),
    ):
        logits_of(model, prompt())
    for hook in hooks:
        hook.remove()
    trace = Trace.load(tmp_path / "t.npz")
    assert trace.hidden is not None
    stacked = torch.stack([x.reshape(-1, x.shape[-1]) for x in seen], dim=1)
    assert stacked.abs().max() > np.finfo(np.float16).max
    expected = stacked.clamp(-65504, 65504).half().numpy()
    np.testing.assert_array_equal(trace.hidden, expected)


def test_sequences_that_ended_are_padding(tmp_path: Path) -> None:
    """Law: what generate() feeds a finished sequence of a batch is not a token of its text."""
    model = tiny_model("mixtral")
    free = generate(model)
    end = int(free[0, -NUM_NEW])  # the first row's first new token ends it
    assert end not in free[1, -NUM_NEW:-1]
    with (
        TraceWriter(tmp_path / "t.npz") as writer,
        RoutingRecorder(model, writer, name="tiny", end_token_ids=[end]),
    ):
        generate(model, eos_token_id=end)
    trace = Trace.load(tmp_path / "t.npz")
    decoded = trace.step > 0
    first, second = decoded & (trace.sequence_id == 0), decoded & (trace.sequence_id == 1)
    assert list(trace.phase[first]) == [Phase.DECODE] + [Phase.PADDING] * (NUM_NEW - 2)
    assert list(trace.phase[second]) == [Phase.DECODE] * (NUM_NEW - 1)


def test_a_new_cache_starts_new_sequences(tmp_path: Path) -> None:
    """Law: sequence ids never repeat; a forward that continues a cache continues its sequences."""
    model = tiny_model("mixtral")
    ids = prompt()
    with (
        TraceWriter(tmp_path / "t.npz") as writer,
        RoutingRecorder(model, writer, name="tiny") as recorder,
        torch.no_grad(),
    ):
        recorder.domains = ["code", "mathematics"]
        first = model(ids[:, :5], use_cache=True).past_key_values
        recorder.domains = []
        second = model(ids[:, :6], use_cache=True).past_key_values
        model(ids[:, 5:8], past_key_values=first)  # in turns
        model(ids[:, 6:7], past_key_values=second)
        model(input_ids=ids, use_cache=False)
    trace = Trace.load(tmp_path / "t.npz")
    assert trace.domain is not None
    by_step = [trace.select(trace.step == step) for step in range(trace.num_steps)]
    assert [sorted(set(part.sequence_id)) for part in by_step] == [
        [0, 1], [2, 3], [0, 1], [2, 3], [4, 5],
    ]  # fmt: skip
    assert [list(part.position[: len(part.position) // 2]) for part in by_step] == [
        [*range(5)], [*range(6)], [5, 6, 7], [6], [*range(12)],
    ]  # fmt: skip
    assert [int(part.phase[0]) for part in by_step] == [0, 0, 0, 1, 0]
    assert sorted(set(trace.domain[trace.sequence_id <= 1])) == ["code", "mathematics"]
    assert set(trace.domain[trace.sequence_id > 1]) == {""}


def test_a_forward_that_raises_leaves_no_rows(tmp_path: Path) -> None:
    """Law: the trace holds whole forwards only, also when one is cut short."""
    model = tiny_model("mixtral")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    def run() -> None:
        with (
            TraceWriter(tmp_path / "t.npz") as writer,
            RoutingRecorder(model, writer, name="tiny"),
        ):
            logits_of(model, prompt())
            model.model.layers[2].register_forward_pre_hook(stop)
            logits_of(model, prompt())

    with pytest.raises(KeyboardInterrupt):
        run()
    assert [file.name for file in tmp_path.iterdir()] == ["t.partial.npz"]
    trace = Trace.load(tmp_path / "t.partial.npz")
    assert trace.num_tokens == prompt().numel()


def test_experts_of_another_rank_are_missing(tmp_path: Path) -> None:
    """Law: an id of num_experts or more, expert parallelism's mark, is -1 and stands last."""
    model = tiny_model("mixtral")
    assert isinstance(model, MixtralForCausalLM)
    num_experts = model.config.num_local_experts

    def elsewhere(_: object, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, index, weights = arguments
        index = index.clone()
        index[:, 0] = num_experts
        return hidden, index, weights

    with TraceWriter(tmp_path / "t.npz") as writer:
        experts = list(experts_modules(model).values())
        hook = experts[0].register_forward_pre_hook(elsewhere)
        with RoutingRecorder(model, writer, name="tiny"):
            logits_of(model, prompt())
        hook.remove()
    trace = Trace.load(tmp_path / "t.npz")
    assert trace.weights is not None
    assert (trace.topk[:, 0, -1] == -1).all()
    assert (trace.weights[:, 0, -1] == 0).all()
    assert (trace.topk[:, 0, 0] >= 0).all()
    assert (trace.topk[:, 1:] >= 0).all()


def test_experts_in_lists_are_refused(tmp_path: Path) -> None:
    """Law: a model whose routing cannot be seen is refused by name, and no file appears."""
    block = torch.nn.Module()
    block.experts = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
    for module, message in (
        (block, "experts is a list of modules"),
        (torch.nn.Linear(4, 4), "Linear has no experts"),
    ):
        with (
            pytest.raises(UnsupportedModelError, match=message),
            TraceWriter(tmp_path / "t.npz") as writer,
        ):
            RoutingRecorder(module, writer, name="tiny")
    assert not list(tmp_path.iterdir())
