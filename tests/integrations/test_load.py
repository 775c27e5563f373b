"""Laws of load(): the tokens and logits of the unmodified model, inside the budget."""

import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import moe_runtime
from moe_runtime.errors import BudgetError, CheckpointError, UnsupportedModelError
from tests.tiny_models import load_unmodified, logits_of, prompt, tiny_model

Checkpoints = Callable[[str], Path]

NUM_LAYERS, NUM_EXPERTS = 4, 8
NAMES = ["mixtral", "mixtral_bf16", "gpt_oss"]
FEW_SLOTS = 0.1  # 3 of 32 experts: every layer of a prompt runs in waves
PADDING_ID = 0

pytestmark = pytest.mark.filterwarnings("ignore:.*expert slots are fewer")


class Pair:
    """The same checkpoint, offloaded and unmodified."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.ours = moe_runtime.load(folder, expert_memory=FEW_SLOTS, exact=True, dtype=dtype)
        self.unmodified = load_unmodified(folder, dtype)

    def same_ids(self, input_ids: torch.Tensor, **settings: Any) -> torch.Tensor:
        """Generate with both and compare; returns the ids."""
        settings.setdefault("attention_mask", torch.ones_like(input_ids))
        settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False} | settings
        found = []
        for model in (self.ours, self.unmodified):
            torch.manual_seed(0)
            result = model.generate(
                input_ids, output_logits=True, return_dict_in_generate=True, **settings
            )
            found.append(result)
        assert torch.equal(found[0].sequences, found[1].sequences)
        if found[0].logits is not None:
            assert len(found[0].logits) == len(found[1].logits)
            for ours, theirs in zip(found[0].logits, found[1].logits, strict=True):
                assert torch.equal(ours, theirs)
        ids: torch.Tensor = found[0].sequences
        return ids


@pytest.fixture(scope="module", params=NAMES)
def pair(request: pytest.FixtureRequest, checkpoint: Checkpoints) -> Pair:
    dtype = torch.bfloat16 if request.param.endswith("bf16") else torch.float32
    return Pair(checkpoint(request.param), dtype)


@pytest.mark.parametrize("num_tokens", [1, 2, 12, 100])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_logits(pair: Pair, num_rows: int, num_tokens: int) -> None:
    """Law: logits of any batch, also prompts that need more experts than slots, are equal."""
    input_ids = prompt(num_rows, num_tokens, seed=num_tokens)
    assert moe_runtime.handle(pair.ours).budget.num_slots < NUM_EXPERTS
    assert torch.equal(logits_of(pair.ours, input_ids), logits_of(pair.unmodified, input_ids))


def test_greedy(pair: Pair) -> None:
    """Law: greedy decoding gives the same tokens and the same logits at every step."""
    pair.same_ids(prompt(2, 12), max_new_tokens=16, min_new_tokens=16)


def test_sampling(pair: Pair) -> None:
    """Law: sampling with the same seed gives the same tokens."""
    pair.same_ids(prompt(2, 12), do_sample=True, temperature=1.3, top_p=0.9)


def test_beam_search(pair: Pair) -> None:
    """Law: beam search, which reorders the batch at every step, gives the same tokens."""
    pair.same_ids(prompt(2, 12), num_beams=3, num_return_sequences=2)


def test_prompt_lookup(pair: Pair) -> None:
    """Law: assisted generation by prompt lookup, several tokens a step, gives the same tokens."""
    repeated = prompt(1, 6).repeat(1, 4)
    pair.same_ids(repeated, prompt_lookup_num_tokens=3)


def test_left_padding(pair: Pair) -> None:
    """Law: a batch of prompts of different lengths, padded on the left, gives the same tokens."""
    input_ids = prompt(3, 12)
    mask = torch.ones_like(input_ids)
    for row, padding in enumerate((0, 3, 7)):
        input_ids[row, :padding] = PADDING_ID
        mask[row, :padding] = 0
    pair.same_ids(input_ids, attention_mask=mask)


def test_grad_modes(pair: Pair) -> None:
    """Law: inference_mode, no_grad and plain calls give the same logits."""
    input_ids = prompt()
    expected = logits_of(pair.unmodified, input_ids)
    with torch.inference_mode():
        assert torch.equal(pair.ours(input_ids=input_ids).logits, expected)
    with torch.no_grad():
        assert torch.equal(pair.ours(input_ids=input_ids).logits, expected)
    found = pair.ours(input_ids=input_ids).logits
    assert found.requires_grad
    assert torch.equal(found, expected)


def test_nan_weights_behave_as_in_transformers(tmp_path: Path) -> None:
    """Law: NaN in one expert's weights reaches the same logits as in the unmodified model."""
    model = tiny_model("mixtral")
    model.model.layers[1].mlp.experts.down_proj.data[3, 5] = float("nan")
    model.save_pretrained(tmp_path)
    ours = moe_runtime.load(tmp_path, expert_memory=FEW_SLOTS, exact=True)
    found, expected = (logits_of(m, prompt(3, 12)) for m in (ours, load_unmodified(tmp_path)))
    assert found.isnan().any()
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


def test_compiled(checkpoint: Checkpoints) -> None:
    """Law: a compiled model runs, with the logits of the model itself."""
    pair = Pair(checkpoint("mixtral"), torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(pair.ours, backend="eager")
    for seed in range(2):
        input_ids = prompt(seed=seed)
        assert torch.equal(logits_of(compiled, input_ids), logits_of(pair.unmodified, input_ids))


def test_assistant_model(checkpoint: Checkpoints) -> None:
    """Law: assisted generation works with an offloaded assistant beside an offloaded model."""
    pair = Pair(checkpoint("mixtral"), torch.float32)
    assistant = Pair(checkpoint("mixtral_tied"), torch.float32)
    found = []
    for model, helper in [
        (pair.ours, assistant.ours), (pair.unmodified, assistant.unmodified),
    ]:  # fmt: skip
        ids = model.generate(
            prompt(1, 12), attention_mask=torch.ones(1, 12), assistant_model=helper,
            max_new_tokens=8, min_new_tokens=8, do_sample=False,
        )  # fmt: skip
        found.append(ids)
    assert torch.equal(*found)
    for model in (pair.ours, assistant.ours):
        assert moe_runtime.handle(model).report()["cache"]["misses"] > 0


def test_models_share_nothing(checkpoint: Checkpoints) -> None:
    """Law: two models of one class in one process, used in turn, do not disturb each other."""
    first = Pair(checkpoint("mixtral"), torch.float32)
    second = Pair(checkpoint("mixtral_tied"), torch.float32)
    again = Pair(checkpoint("mixtral"), torch.float32)
    for seed in range(3):
        for pair in (first, second, again):
            input_ids = prompt(2, 12, seed)
            found = logits_of(pair.ours, input_ids)
            assert torch.equal(found, logits_of(pair.unmodified, input_ids))
    moe_runtime.handle(first.ours).close()
    input_ids = prompt(1, 5)
    assert torch.equal(logits_of(again.ours, input_ids), logits_of(again.unmodified, input_ids))


def test_policies_and_page_cache(checkpoint: Checkpoints) -> None:
    """Law: neither the policy nor the way of reading changes a bit; the report says which."""
    expected = logits_of(load_unmodified(checkpoint("mixtral")), prompt())
    for policy in ("lru", "lfu"):
        for page_cache in (False, True):
            model = moe_runtime.load(
                checkpoint("mixtral"),
                expert_memory="40%",
                exact=True,
                policy=policy,
                page_cache=page_cache,
            )
            assert torch.equal(logits_of(model, prompt()), expected)
            report = moe_runtime.handle(model).report()
            assert report["cache"]["policy"] == policy
            assert not (page_cache and report["settings"]["direct_reads"])


def test_report_counts_what_was_read(checkpoint: Checkpoints) -> None:
    """Law: misses times bytes per expert is what was read, but for alignment."""
    model = moe_runtime.load(checkpoint("mixtral"), expert_memory="35%", exact=True)
    for seed in range(4):
        logits_of(model, prompt(1, 1, seed))
    cache = moe_runtime.handle(model).report()["cache"]
    assert cache["hits"] + cache["misses"] == 4 * NUM_LAYERS * 2
    assert cache["hit_rate"] == cache["hits"] / (cache["hits"] + cache["misses"])
    assert sum(layer["misses"] for layer in cache["per_layer"]) == cache["misses"]
    assert [layer["layer"] for layer in cache["per_layer"]] == list(range(NUM_LAYERS))
    weight_bytes = 3 * 64 * 40 * 4
    least, extents = cache["misses"] * weight_bytes, 3
    assert least <= cache["bytes_read"] <= least + cache["misses"] * extents * 2 * 4096


# --- as from_pretrained ---


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"dtype": "auto"}, {"dtype": torch.bfloat16}, {"dtype": "float16"},
        {"torch_dtype": torch.float32}, {"attn_implementation": "eager"},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("name", ["mixtral", "mixtral_bf16"])
def test_dtypes_and_settings_as_from_pretrained(
    checkpoint: Checkpoints, name: str, settings: dict[str, Any]
) -> None:
    """Law: dtype, buffers, attention and logits follow from_pretrained, casts included."""
    ours = moe_runtime.load(checkpoint(name), expert_memory="25%", exact=True, **settings)
    theirs = AutoModelForCausalLM.from_pretrained(
        checkpoint(name), experts_implementation="eager", **settings
    )
    assert ours.dtype == theirs.dtype
    assert ours.config._attn_implementation == theirs.config._attn_implementation
    buffers = dict(ours.named_buffers())
    assert buffers.keys() == dict(theirs.named_buffers()).keys()
    for key, value in theirs.named_buffers():
        assert buffers[key].dtype == value.dtype
        assert torch.equal(buffers[key], value)
    assert any(value.dtype == torch.float32 for value in buffers.values())
    dense = dict(theirs.named_parameters())
    for key, value in ours.named_parameters():
        assert value.dtype == dense[key].dtype
        assert torch.equal(value, dense[key])
    assert torch.equal(logits_of(ours, prompt()), logits_of(theirs, prompt()))


def test_untied_embeddings_are_mapped_and_not_read(checkpoint: Checkpoints) -> None:
    """Law: on CPU an embedding costs no memory of the budget; tied or cast, it is read."""
    model = moe_runtime.load(checkpoint("mixtral"), expert_memory="25%")
    memory = moe_runtime.handle(model).report()["memory"]
    assert memory["mapped_bytes"] == model.model.embed_tokens.weight.nbytes
    assert is_mapped(model.model.embed_tokens.weight)
    assert not is_mapped(model.lm_head.weight)
    for name, arguments in (("mixtral_tied", {}), ("mixtral", {"dtype": torch.bfloat16})):
        other = moe_runtime.load(checkpoint(name), expert_memory="25%", **arguments)
        assert not is_mapped(other.model.embed_tokens.weight)
        assert moe_runtime.handle(other).report()["memory"]["mapped_bytes"] == 0


def is_mapped(tensor: torch.Tensor) -> bool:
    """Whether the tensor's memory is that of a file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, *_, place = line.split(maxsplit=5)
        start, end = (int(address, 16) for address in addresses.split("-"))
        if start <= tensor.data_ptr() < end:
            return place.endswith(".safetensors")
    return False


def test_a_restored_model_outlives_its_files(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """Law: after restore() nothing is mapped, so the model may be saved over its own files."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("mixtral"), folder)
    model = moe_runtime.load(folder, expert_memory="25%", exact=True)
    expected = logits_of(model, prompt())
    moe_runtime.handle(model).restore()
    assert not is_mapped(model.model.embed_tokens.weight)
    model.save_pretrained(folder)
    assert torch.equal(logits_of(model, prompt()), expected)
    assert torch.equal(logits_of(moe_runtime.load(folder, exact=True), prompt()), expected)


def test_tied_weights_stay_tied(checkpoint: Checkpoints) -> None:
    """Law: a tied head is the embedding itself, and counts once."""
    model = moe_runtime.load(checkpoint("mixtral_tied"), expert_memory="25%", exact=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    memory = moe_runtime.handle(model).report()["memory"]
    untied = moe_runtime.load(checkpoint("mixtral"), expert_memory="25%", exact=True)
    difference = moe_runtime.handle(untied).report()["memory"]["dense_bytes"]
    assert difference - memory["dense_bytes"] == model.lm_head.weight.nbytes
    assert torch.equal(
        logits_of(model, prompt()), logits_of(load_unmodified(checkpoint("mixtral_tied")), prompt())
    )


def test_generation_config_and_class(checkpoint: Checkpoints) -> None:
    """Law: the saved generation config is in force, and the class is transformers' own."""
    model = moe_runtime.load(checkpoint("mixtral"), expert_memory="25%", exact=True)
    assert model.generation_config.repetition_penalty == 1.25
    assert type(model) is type(load_unmodified(checkpoint("mixtral")))
    assert isinstance(model, PreTrainedModel)
    assert not model.training


def test_loading_info(checkpoint: Checkpoints) -> None:
    """Law: output_loading_info reports no tensor as missing or unexpected."""
    model, info = moe_runtime.load(
        checkpoint("mixtral"), expert_memory="25%", exact=True, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.isfinite(logits_of(model, prompt())).all()


def test_config_attributes_are_arguments(checkpoint: Checkpoints) -> None:
    """Law: attributes of the config may be given, as to from_pretrained."""
    model = moe_runtime.load(
        checkpoint("mixtral"), expert_memory="25%", exact=True, sliding_window=6
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        checkpoint("mixtral"), experts_implementation="eager", sliding_window=6
    )
    assert model.config.sliding_window == 6
    assert torch.equal(logits_of(model, prompt()), logits_of(theirs, prompt()))


def test_sharded_checkpoint(tmp_path: Path, checkpoint: Checkpoints) -> None:
    """Law: a checkpoint in many shards, an expert spread over several, is one model."""
    model = load_unmodified(checkpoint("mixtral"))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 10
    ours = moe_runtime.load(tmp_path, expert_memory=FEW_SLOTS, exact=True)
    expected = logits_of(load_unmodified(tmp_path), prompt())
    assert torch.equal(logits_of(ours, prompt()), expected)


# --- memory and disk ---


def test_no_copy_on_disk(
    checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: loading and running write nothing, neither beside the checkpoint nor elsewhere."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = checkpoint("mixtral")
    before = {f: (f.stat().st_size, f.stat().st_mtime_ns) for f in folder.rglob("*")}
    model = moe_runtime.load(folder, expert_memory="25%", exact=True)
    logits_of(model, prompt())
    assert {f: (f.stat().st_size, f.stat().st_mtime_ns) for f in folder.rglob("*")} == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("expert_memory", "num_slots"),
    [("auto", 32), (1.0, 32), ("50%", 16), (0.25, 8), ("10GiB", 32), (3 * 3 * 64 * 40 * 4, None)],
)
def test_budget_is_kept(
    checkpoint: Checkpoints, expert_memory: str | float, num_slots: int | None
) -> None:
    """Law: slots take at most what was allowed, and never more than all experts."""
    model = moe_runtime.load(checkpoint("mixtral"), expert_memory=expert_memory, exact=True)
    handle = moe_runtime.handle(model)
    slot_bytes = handle.engine.slots.slot_bytes
    if isinstance(expert_memory, int):
        assert handle.engine.slots.num_slots == expert_memory // slot_bytes
        assert handle.engine.slots.num_slots * slot_bytes <= expert_memory
    else:
        assert handle.engine.slots.num_slots == num_slots
    assert sum(p.numel() for p in model.parameters()) * 4 <= handle._dense_bytes


def test_below_the_floor(checkpoint: Checkpoints) -> None:
    """Law: too little memory raises BudgetError with the floor, and the floor itself works."""
    with pytest.raises(BudgetError, match=r"below the floor of .*set expert_memory=\d+") as caught:
        moe_runtime.load(checkpoint("mixtral"), expert_memory="1KiB", exact=True)
    found = re.search(r"expert_memory=(\d+)", str(caught.value))
    assert found is not None
    floor = int(found.group(1))
    with pytest.raises(BudgetError):
        moe_runtime.load(checkpoint("mixtral"), expert_memory=floor - 1)
    model = moe_runtime.load(checkpoint("mixtral"), expert_memory=floor, exact=True)
    assert moe_runtime.handle(model).budget.num_slots == 2
    expected = logits_of(load_unmodified(checkpoint("mixtral")), prompt(2, 60))
    assert torch.equal(logits_of(model, prompt(2, 60)), expected)


def test_max_memory(checkpoint: Checkpoints) -> None:
    """Law: max_memory bounds dense weights and experts together on the device in use."""
    everything = moe_runtime.handle(moe_runtime.load(checkpoint("mixtral")))
    memory, slot = everything.report()["memory"], everything.budget.slot_bytes
    dense = memory["dense_bytes"] - memory["mapped_bytes"]
    for limit in (dense + 5 * slot + 1, f"{dense + 5 * slot}B"):
        model = moe_runtime.load(checkpoint("mixtral"), max_memory={0: "1KiB", "cpu": limit})
        assert moe_runtime.handle(model).budget.num_slots == 5
    model = moe_runtime.load(checkpoint("mixtral"), max_memory={0: "1KiB"})
    assert moe_runtime.handle(model).budget.holds_all
    with pytest.raises(BudgetError, match="max_memory"):
        moe_runtime.load(checkpoint("mixtral"), max_memory={"cpu": dense + slot})
    with pytest.raises(BudgetError):
        moe_runtime.load(checkpoint("mixtral"), max_memory={"cpu": "50%"})


def test_few_slots_warn(checkpoint: Checkpoints) -> None:
    """Law: a budget in which the cache cannot hit says so once and says what would."""
    with pytest.warns(UserWarning, match=r"3 expert slots are fewer than the 8 .* let the cache"):
        moe_runtime.load(checkpoint("mixtral"), expert_memory=FEW_SLOTS, exact=True)


# --- refusals ---


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"expert_memroy": "1GiB"}, TypeError, "unknown argument 'expert_memroy'"),
        ({"low_cpu_mem_usage_": True}, TypeError, "'low_cpu_mem_usage_'"),
        ({"experts_implementation": "eager"}, TypeError, "experts_implementation has no effect"),
        ({"policy": "best"}, ValueError, "policy 'best' is unknown; choose from lru, lfu"),
        ({"expert_memory": "lots"}, BudgetError, "'lots' is not a size"),
        ({"device_map": "auto"}, ValueError, "device_map='auto' is accelerate's"),
        ({"device_map": {"model": 0, "lm_head": "cpu"}}, ValueError, "spreads the model"),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
def test_bad_arguments_raise(
    checkpoint: Checkpoints, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    """Law: no argument is swallowed: what load() does not understand raises and is named."""
    with pytest.raises(error, match=re.escape(message)):
        moe_runtime.load(checkpoint("mixtral"), **arguments)


def test_dense_model_is_refused(tmp_path: Path) -> None:
    """Law: a model without experts raises UnsupportedModelError, not a plain model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="no experts that moe_runtime can offload"):
        moe_runtime.load(tmp_path)


def test_absent_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: a folder without a model, or nothing at all, raises CheckpointError."""
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        moe_runtime.load(tmp_path)
    with pytest.raises(CheckpointError, match="neither a folder nor a hub id"):
        moe_runtime.load(tmp_path / "absent")


def saved(tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A Mixtral checkpoint whose tensors went through `change`."""
    from safetensors.torch import load_file, save_file

    tiny_model("mixtral").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def expert_name(tensors: dict[str, torch.Tensor]) -> str:
    (name,) = [n for n in tensors if re.search(r"layers\.2\..*experts\.5\.w1\.weight", n)]
    return name


CHANGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "missing": (lambda t: t.pop(expert_name(t)), "layers.2"),
    "shape": (lambda t: t.update({expert_name(t): torch.zeros(41, 64)}), "layers.2"),
    "transposed": (lambda t: t.update({expert_name(t): torch.zeros(64, 40)}), "layers.2"),
    "dtype": (
        lambda t: t.update({expert_name(t): torch.zeros(40, 64).half()}),
        "disagree in dtype",
    ),
    "integers": (
        lambda t: t.update(
            {n: v.to(torch.int8) for n, v in t.items() if "experts" in n and "layers.2" in n}
        ),
        "quantised",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_unfit_expert_is_named(tmp_path: Path, change: str) -> None:
    """Law: one missing, misshapen or mistyped expert raises CheckpointError naming its layer."""
    act, message = CHANGES[change]
    with pytest.raises(CheckpointError, match=message) as caught:
        moe_runtime.load(saved(tmp_path, act))
    assert "layers.2" in str(caught.value)


def test_file_that_changes_stops(tmp_path: Path) -> None:
    """Law: a checkpoint overwritten while in use stops generation with file and offset."""
    from moe_runtime.errors import ExpertReadError

    tiny_model("mixtral").save_pretrained(tmp_path)
    model = moe_runtime.load(tmp_path, expert_memory=FEW_SLOTS, exact=True)
    logits_of(model, prompt())
    os.truncate(tmp_path / "model.safetensors", 5000)
    with pytest.raises(ExpertReadError, match=r"model\.safetensors.* offset \d+"):
        model.generate(prompt(1, 12), attention_mask=torch.ones(1, 12), max_new_tokens=8)
    moe_runtime.handle(model).close()
