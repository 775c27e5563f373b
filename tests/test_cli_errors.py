"""Bad input ends with a non-zero exit code and one sentence that names the thing and the remedy."""

import json
import os
import pty
import select
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from moe_runtime.kernels.launch import check_dtype
from moe_runtime.measure import generation_request
from tests.command_line import Outcome, command, environment, run_here
from tests.tiny_checkpoint import (
    CONTEXT_TOKENS,
    change_config,
    read_header,
    save_mixtral,
    save_tokenizer,
    write_header,
)

EXPERT = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
DENSE = "model.layers.1.self_attn.q_proj.weight"
END_SECONDS = 60.0  # a hang, not a speed: busy machines take seconds to end a process
START_SECONDS = 120.0

Capsys = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixtral(tmp_path_factory.mktemp("mixtral") / "model")


@pytest.fixture(scope="module")
def saved_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixtral(tmp_path_factory.mktemp("shards") / "model", max_shard_size="60kB")


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def shards(saved_shards: Path, tmp_path: Path) -> Path:
    """A copy in several files to damage."""
    return Path(shutil.copytree(saved_shards, tmp_path / "model"))


def generate(capsys: Capsys, model: str | Path, *options: str | Path) -> Outcome:
    return run_here(capsys, "generate", model, "--prompt", "hi", "--max-new-tokens", "2", *options)


def weights(model: Path) -> Path:
    return model / "model.safetensors"


def resave(model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Save the tensors again after `change`: a sound file that does not fit its model."""
    tensors = load_file(weights(model))
    change(tensors)
    save_file(tensors, weights(model), metadata={"format": "pt"})


def test_what_a_kernel_refuses_is_said_as_it_is(
    capsys: Capsys, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: also errors of the rooms beside the package are ours, and not unexpected."""

    def refuse(*_: object, **__: object) -> None:
        check_dtype("x", torch.zeros(1, dtype=torch.int8), (torch.bfloat16,))

    monkeypatch.setattr(generation_request, "load", refuse)
    outcome = generate(capsys, model)
    assert outcome.code == 1
    assert "x is torch.int8; supported: torch.bfloat16" in outcome.err
    assert "unexpected" not in outcome.err


def test_a_sound_model_runs(capsys: Capsys, model: Path) -> None:
    """Law: what fails below fails for the damage, not for the way it is asked."""
    outcome = generate(capsys, model, "--expert-memory", "50%")
    assert outcome.code == 0, outcome.err


# Memory


def test_budget_below_the_floor_says_the_floor(capsys: Capsys, model: Path) -> None:
    error = generate(capsys, model, "--expert-memory", "20KiB").error()
    assert "below the floor of 30.0 KiB" in error
    assert "set expert_memory=30720 or more" in error


@pytest.mark.parametrize("size", ["a lot", "0", "150%", "-5MiB"])
def test_malformed_budget(capsys: Capsys, model: Path, size: str) -> None:
    error = generate(capsys, model, f"--expert-memory={size}").error()
    assert f"expert_memory '{size}'" in error
    assert "512MiB" in error


@pytest.mark.parametrize("limit", ["cpu", "=1GiB", "cpu=", "cpu=auto", "cpu=50%", "cpu=much"])
def test_malformed_memory_limit(capsys: Capsys, model: Path, limit: str) -> None:
    error = generate(capsys, model, "--max-memory", limit).error()
    assert f"--max-memory {limit!r}" in error
    assert "write cpu=30GiB" in error


def test_memory_limit_too_low_for_any_expert(capsys: Capsys, model: Path) -> None:
    error = generate(capsys, model, "--max-memory", "cpu=80KiB").error()
    assert "below the floor" in error
    assert "set max_memory['cpu']=" in error


# Models


def test_missing_folder(capsys: Capsys, tmp_path: Path) -> None:
    missing = tmp_path / "no" / "such" / "model"
    error = generate(capsys, missing).error()
    assert str(missing) in error
    assert "neither a folder nor a hub id" in error


def test_folder_without_config(capsys: Capsys, tmp_path: Path) -> None:
    assert f"{tmp_path} holds no config.json" in generate(capsys, tmp_path).error()


def test_config_that_is_not_json(capsys: Capsys, model: Path) -> None:
    (model / "config.json").write_text("{")
    assert "config.json" in generate(capsys, model).error()


def test_folder_without_weights(capsys: Capsys, model: Path) -> None:
    weights(model).unlink()
    assert "holds neither model.safetensors nor" in generate(capsys, model).error()


def test_folder_without_tokenizer(capsys: Capsys, model: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()
    assert "has no tokenizer" in generate(capsys, model).error()


def test_not_a_mixture_of_experts(capsys: Capsys, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    for outcome in (generate(capsys, tmp_path), run_here(capsys, "inspect", tmp_path)):
        error = outcome.error()
        assert "LlamaForCausalLM has no experts" in error
        assert "docs/families.md" in error


def test_unknown_family(capsys: Capsys, model: Path) -> None:
    change_config(model, model_type="nonsense")
    error = generate(capsys, model).error()
    assert "nonsense" in error
    assert "config.json is not a config that transformers" in error
    assert "update transformers" in error


def test_code_that_comes_with_a_model_is_not_run(capsys: Capsys, model: Path) -> None:
    change_config(
        model, model_type="own", auto_map={"AutoConfig": "own.OwnConfig"}, architectures=["Own"]
    )
    (model / "own.py").write_text("raise SystemExit('it ran')\n")
    error = generate(capsys, model).error()
    assert "runs code of its own" in error
    assert "--trust-remote-code" in error


def test_quantised_checkpoint(capsys: Capsys, model: Path) -> None:
    change_config(model, quantization_config={"quant_method": "gptq", "bits": 4})
    error = generate(capsys, model).error()
    assert "is quantised (gptq)" in error
    assert "fp8 as DeepSeek-V3 has it and mxfp4 as gpt-oss has it are" in error
    change_config(model, quantization_config={"quant_method": "fp8", "weight_block_size": [8, 8]})
    error = generate(capsys, model).error()
    assert "weight_block_size = [8, 8], and fp8 is supported with [128, 128]" in error


# Damaged files


def test_truncated_file(capsys: Capsys, model: Path) -> None:
    os.truncate(weights(model), weights(model).stat().st_size - 1000)
    error = generate(capsys, model).error()
    assert f"{weights(model)} is damaged" in error
    assert "truncated; download the file again" in error


def test_file_shorter_than_a_header(capsys: Capsys, model: Path) -> None:
    weights(model).write_bytes(b"abc")
    assert "too few for a header" in generate(capsys, model).error()


def test_header_that_is_not_json(capsys: Capsys, model: Path) -> None:
    weights(model).write_bytes(struct.pack("<Q", 8) + b"notjson!")
    assert "header is not JSON" in generate(capsys, model).error()


def test_overlapping_tensors(capsys: Capsys, model: Path) -> None:
    header, data = read_header(weights(model))
    names = [name for name in header if name.endswith("w1.weight")]
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]
    write_header(weights(model), header, data)
    error = generate(capsys, model).error()
    assert names[0] in error
    assert names[1] in error
    assert "overlap" in error


def test_absurdly_long_header(capsys: Capsys, model: Path) -> None:
    weights(model).write_bytes(struct.pack("<Q", 2**40) + weights(model).read_bytes()[8:])
    error = generate(capsys, model).error()
    assert f"header claims {2**40} bytes" in error


def test_shard_named_in_the_index_but_absent(capsys: Capsys, shards: Path) -> None:
    shard = sorted(shards.glob("model-*.safetensors"))[1]
    shard.unlink()
    error = generate(capsys, shards).error()
    assert shard.name in error
    assert "does not exist; download the checkpoint completely" in error


@pytest.mark.parametrize("place", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", ".."])
def test_index_that_leaves_the_folder(capsys: Capsys, shards: Path, place: str) -> None:
    file = shards / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"][EXPERT] = place
    file.write_text(json.dumps(index))
    error = generate(capsys, shards).error()
    assert repr(place) in error
    assert "leaves the model folder; do not use this checkpoint" in error


def test_expert_in_another_dtype(capsys: Capsys, model: Path) -> None:
    resave(model, lambda tensors: tensors.update({EXPERT: tensors[EXPERT].half()}))
    error = generate(capsys, model).error()
    assert EXPERT in error
    assert "disagree in dtype" in error


def test_expert_of_another_shape(capsys: Capsys, model: Path) -> None:
    resave(model, lambda tensors: tensors.update({EXPERT: tensors[EXPERT][:-1].clone()}))
    error = generate(capsys, model).error()
    assert "model.layers.1.mlp.experts.down_proj" in error


def test_missing_expert(capsys: Capsys, model: Path) -> None:
    resave(model, lambda tensors: tensors.pop(EXPERT))
    error = generate(capsys, model).error()
    assert "model.layers.1.mlp.experts.down_proj" in error
    assert "missing" in error


def test_expert_in_integers(capsys: Capsys, model: Path) -> None:
    def to_integers(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if ".experts." in name:
                tensors[name] = tensors[name].to(torch.int8)

    resave(model, to_integers)
    assert "is quantised, and config.json does not say how" in generate(capsys, model).error()


def test_missing_dense_weight(capsys: Capsys, model: Path) -> None:
    resave(model, lambda tensors: tensors.pop(DENSE))
    assert f"{model} lacks {DENSE}" in generate(capsys, model).error()


def test_dense_weight_of_another_shape(capsys: Capsys, model: Path) -> None:
    resave(model, lambda tensors: tensors.update({DENSE: tensors[DENSE][:5].clone()}))
    error = generate(capsys, model).error()
    assert f"have other shapes than its config.json says: {DENSE} (F32 [5, 32]" in error
    assert "should be [32, 32]" in error


def test_config_with_a_value_of_the_wrong_kind(capsys: Capsys, model: Path) -> None:
    change_config(model, hidden_size="wide")
    error = generate(capsys, model).error()
    assert "config.json" in error
    assert "hidden_size" in error


def test_weights_that_are_not_numbers_give_what_transformers_gives(
    capsys: Capsys, model: Path
) -> None:
    """Law: NaN is data. The check runs the unmodified model in its own process."""
    resave(model, lambda tensors: tensors[EXPERT].fill_(float("nan")))
    outcome = generate(capsys, model, "--expert-memory", "50%", "--exact", "--check", "--json")
    assert outcome.code == 0, outcome.err
    parity = json.loads(outcome.out)["parity"]
    assert parity["identical"] is True
    assert parity["max_abs_logit_diff"] == 0


# Prompts


def test_prompt_longer_than_the_context(capsys: Capsys, model: Path) -> None:
    error = generate(capsys, model, "--prompt", "x" * 200).error()
    assert f"prompt 1 has 200 tokens and the model's context is {CONTEXT_TOKENS}" in error
    assert "shorten" in error


def test_prompt_that_leaves_room_for_a_few_tokens(capsys: Capsys, model: Path) -> None:
    """Law: new tokens are capped by the context, and the user is told."""
    prompt = "x" * (CONTEXT_TOKENS - 3)
    outcome = run_here(
        capsys, "generate", model, "--prompt", prompt, "--max-new-tokens", "50", "--json"
    )
    assert outcome.code == 0
    assert "room for 3 new ones, not 50" in outcome.err
    (result,) = json.loads(outcome.out)["results"]
    assert len(result["token_ids"]) == 3
    assert result["finish_reason"] == "length"


def test_empty_prompt(capsys: Capsys, model: Path) -> None:
    error = generate(capsys, model, "--prompt", "").error()
    assert "prompt 1 is empty" in error


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_empty_prompt_file(capsys: Capsys, model: Path, tmp_path: Path, content: str) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(content)
    error = run_here(capsys, "generate", model, "--prompts", file).error()
    assert f"{file} holds no prompt" in error


def test_missing_prompt_file(capsys: Capsys, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    error = run_here(capsys, "generate", model, "--prompts", file).error()
    assert f"{file} cannot be read" in error


def test_damaged_prompt_file(capsys: Capsys, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    assert f"line 2 of {file}" in run_here(capsys, "generate", model, "--prompts", file).error()
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in run_here(capsys, "generate", model, "--prompts", file).error()


def test_both_or_neither_of_the_prompt_options(capsys: Capsys, model: Path) -> None:
    outcome = generate(capsys, model, "--prompts", "file.txt")
    assert outcome.code == 2
    assert "give --prompt or --prompts, not both" in outcome.error()
    outcome = run_here(capsys, "generate", model)
    assert outcome.code == 2
    assert "give --prompt TEXT, or --prompts FILE" in outcome.error()


def test_chat_without_a_template(capsys: Capsys, model: Path) -> None:
    error = generate(capsys, model, "--chat").error()
    assert "--chat needs a chat template" in error


# Options


@pytest.mark.parametrize("option", ["--policy", "--dtype"])
def test_unknown_choice(capsys: Capsys, model: Path, option: str) -> None:
    outcome = generate(capsys, model, option, "best")
    assert outcome.code == 2
    error = outcome.error()
    assert option in error
    assert "'best' is not one of" in error
    assert "generate --help" in error


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "meta"])
def test_unknown_device(capsys: Capsys, model: Path, device: str) -> None:
    assert device in generate(capsys, model, "--device", device).error()


@pytest.mark.parametrize(
    ("options", "wording"),
    [
        (("--top-p", "0.5"), "set a temperature above 0"),
        (("--temperature", "-1"), "--temperature"),
        (("--max-new-tokens", "0"), "--max-new-tokens"),
        (("--stop", ""), "a stop string is empty"),
    ],
)
def test_senseless_decoding(
    capsys: Capsys, model: Path, options: tuple[str, ...], wording: str
) -> None:
    assert wording in generate(capsys, model, *options).error()


def test_unknown_command_and_option(capsys: Capsys) -> None:
    outcome = run_here(capsys, "gen")
    assert outcome.code == 2
    assert "gen" in outcome.error()
    outcome = run_here(capsys, "generate", "x", "--no-such-option")
    assert outcome.code == 2
    assert "--no-such-option" in outcome.error()


def test_errors_leave_stdout_empty_with_json(capsys: Capsys, model: Path) -> None:
    outcome = generate(capsys, model, "--json", "--expert-memory", "1KiB")
    assert outcome.out == ""
    assert "below the floor" in outcome.error()


def test_the_variable_brings_the_traceback_back(
    capsys: Capsys, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_RUNTIME_TRACEBACK", "1")
    with pytest.raises(ValueError, match="below the floor"):
        generate(capsys, model, "--expert-memory", "1KiB")


# Interrupts


def test_ctrl_c_in_mid_generation_leaves_a_sane_terminal(tmp_path: Path) -> None:
    """Law: the process ends with code 130, no traceback, the cursor shown."""
    endless = save_mixtral(tmp_path, max_position_embeddings=10**6, eos_token_id=None)
    master, slave = pty.openpty()
    process = subprocess.Popen(
        command(
            "generate", endless, "--prompt", "def read(self):",
            "--expert-memory", "50%", "--max-new-tokens", "900000",
        ),
        stdin=slave, stdout=slave, stderr=slave, env=environment(), start_new_session=True,
        # A test run in the background of a shell inherits an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    os.close(slave)
    written = b""
    try:
        deadline = time.monotonic() + START_SECONDS
        while b"def read(self):" not in written and time.monotonic() < deadline:
            written += read_some(master)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        sent = time.monotonic()
        while process.poll() is None and time.monotonic() < sent + END_SECONDS:
            written += read_some(master)
        assert process.poll() == 130, written.decode(errors="replace")
        written += read_some(master)
    finally:
        process.kill()
        process.wait()
        os.close(master)
    text = written.decode(errors="replace")
    assert "Traceback" not in text
    assert "interrupted" in text
    assert text.rfind("\x1b[?25h") >= text.rfind("\x1b[?25l"), "the cursor stays hidden"


def read_some(descriptor: int) -> bytes:
    """What a terminal has to show now; nothing when its other end is closed."""
    ready, _, _ = select.select([descriptor], [], [], 0.1)
    try:
        return os.read(descriptor, 65536) if ready else b""
    except OSError:
        return b""
