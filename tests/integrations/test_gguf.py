"""llama.cpp computes from the GGUF what transformers computes from the checkpoint."""

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moe_runtime.errors import CheckpointError, MissingPackageError, UnsupportedModelError
from moe_runtime.integrations.gguf import write_gguf
from moe_runtime.measure.bench.random_checkpoint import write_random_checkpoint
from tests.small_preset import NAMES, small_preset
from tests.tiny_checkpoint import change_config

NUM_TOKENS = 20
# Norm of a token's difference over the norm of its logits, median over tokens. llama.cpp rounds
# activations to the dtype of the weights. A token whose router falls between two experts gets
# another one of them: such tokens are far off in either order of summing, and few.
TOLERANCE = {"f16": 1e-2, "bf16": 5e-2}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in NAMES:
        write_random_checkpoint(small_preset(name), folder / name)
    return folder


@pytest.fixture
def olmoe(tmp_path: Path) -> Path:
    """One to damage."""
    return write_random_checkpoint(small_preset("olmoe-1b-7b"), tmp_path / "olmoe")


def tokens() -> list[int]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 128, (NUM_TOKENS,), generator=generator).tolist()


def logits_of_transformers(folder: Path) -> npt.NDArray[np.float32]:
    """`[T, V]` in float32, one token at a time."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    )
    past, rows = None, []
    with torch.no_grad():
        for token in tokens():
            out = model(torch.tensor([[token]]), past_key_values=past, use_cache=True)
            past = out.past_key_values
            rows.append(out.logits[0, -1].numpy())
    return np.stack(rows)


def logits_of_llama_cpp(file: Path) -> npt.NDArray[np.float32]:
    """`[T, V]`, one token at a time."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p())
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(
        str(file).encode(), llama_cpp.llama_model_default_params()
    )
    assert model
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = 256
    context = llama_cpp.llama_init_from_model(model, settings)
    num_logits = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    rows = []
    for token in tokens():
        batch = llama_cpp.llama_batch_get_one((llama_cpp.llama_token * 1)(token), 1)
        assert llama_cpp.llama_decode(context, batch) == 0
        pointer = llama_cpp.llama_get_logits_ith(context, -1)
        rows.append(np.ctypeslib.as_array(pointer, (num_logits,)).copy())
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return np.stack(rows)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(
    name: str, dtype: str, checkpoints: Path, tmp_path: Path
) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")
    found = logits_of_llama_cpp(write_gguf(checkpoints / name, tmp_path / "it.gguf", dtype=dtype))
    expected = logits_of_transformers(checkpoints / name)
    errors = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert np.median(errors) < TOLERANCE[dtype]
    best_two = np.sort(expected, axis=1)[:, -2:]
    is_clear = best_two[:, 1] - best_two[:, 0] > 2 * np.abs(found - expected).max(axis=1)
    assert is_clear.mean() > 0.5
    assert (found.argmax(1) == expected.argmax(1))[is_clear].all()


@pytest.mark.parametrize("name", NAMES)
def test_weights_keep_their_bits(name: str, checkpoints: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    reader = gguf.GGUFReader(write_gguf(checkpoints / name, tmp_path / "it.gguf", dtype="bf16"))
    found = {tensor.name: tensor for tensor in reader.tensors}
    (file,) = (checkpoints / name).glob("*.safetensors")
    source = load_file(file)
    assert sum(tensor.n_elements for tensor in reader.tensors) == sum(
        weight.numel() for weight in source.values()
    )
    down = "block_sparse_moe.experts.3.w2" if "mixtral" in name else "mlp.experts.3.down_proj"
    for ours, theirs in (
        (found["token_embd.weight"].data, source["model.embed_tokens.weight"]),
        (found["blk.1.ffn_down_exps.weight"].data[3], source[f"model.layers.1.{down}.weight"]),
    ):
        assert ours.tobytes() == theirs.view(torch.int16).numpy().tobytes()


def test_progress_ends_with_all_bytes_and_nothing_else_is_left(olmoe: Path) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")
    seen: list[tuple[int, int]] = []
    file = write_gguf(
        olmoe, olmoe.parent / "it.gguf", on_progress=lambda done, total: seen.append((done, total))
    )
    done, total = seen[-1]
    assert done == total
    assert sorted(olmoe.parent.iterdir()) == [file, olmoe]


def test_a_finished_file_is_left_until_its_checkpoint_or_dtype_changes(olmoe: Path) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")

    def written(dtype: str = "bf16") -> bool:
        seen: list[int] = []
        write_gguf(
            olmoe,
            olmoe.parent / "it.gguf",
            dtype=dtype,
            on_progress=lambda done, total: seen.append(done),
        )
        return bool(seen)

    assert written()
    assert not written()
    assert written("f16")
    (shard,) = olmoe.glob("*.safetensors")
    save_file(load_file(shard), shard, metadata={"format": "pt"})
    assert written("f16")


def test_half_a_file_is_written_again(olmoe: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    file = write_gguf(olmoe, olmoe.parent / "it.gguf")
    whole = file.read_bytes()
    for num_bytes in (0, 10, 1000, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:num_bytes])
        write_gguf(olmoe, file)
        assert file.read_bytes() == whole
    assert len(gguf.GGUFReader(file).tensors) == 3 * 12 + 3


def test_an_interrupted_run_leaves_nothing(olmoe: Path) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_gguf(olmoe, olmoe.parent / "it.gguf", on_progress=interrupt)
    assert list(olmoe.parent.iterdir()) == [olmoe]


def test_a_weight_beyond_f16_is_refused_and_bf16_holds_it(olmoe: Path) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")
    (shard,) = olmoe.glob("*.safetensors")
    weights = load_file(shard)
    weights["model.layers.0.mlp.experts.2.up_proj.weight"][0, 0] = 1e5
    save_file(weights, shard, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"blk\.0\.ffn_up_exps\.weight holds weights beyond"):
        write_gguf(olmoe, olmoe.parent / "it.gguf", dtype="f16")
    write_gguf(olmoe, olmoe.parent / "it.gguf", dtype="bf16")


def test_a_missing_expert_is_noticed(olmoe: Path) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")
    index = olmoe / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["model.layers.2.mlp.experts.7.up_proj.weight"]
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"holds 7 experts of .* and its config says 8"):
        write_gguf(olmoe, olmoe.parent / "it.gguf")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "gpt_oss"}, "gpt_oss cannot be written .* mixtral, olmoe, qwen3_moe, deep"),
        ({"norm_topk_prob": True}, "norm_topk_prob = False only, .* config has True"),
        ({"clip_qkv": 8.0}, "clip_qkv = None only"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rotary"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    changes: dict[str, Any], said: str, olmoe: Path
) -> None:
    change_config(olmoe, **changes)
    with pytest.raises(UnsupportedModelError, match=said):
        write_gguf(olmoe, olmoe.parent / "it.gguf")


def test_an_unknown_dtype_is_refused(olmoe: Path) -> None:
    with pytest.raises(ValueError, match="GGUF dtype 'q4_0' is not known; give bf16 or f16"):
        write_gguf(olmoe, olmoe.parent / "it.gguf", dtype="q4_0")


def test_without_the_package_the_command_that_installs_it_is_named(
    olmoe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingPackageError, match="pip install gguf"):
        write_gguf(olmoe, olmoe.parent / "it.gguf")
