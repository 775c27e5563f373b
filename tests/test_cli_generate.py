"""`moe-runtime generate` writes the tokens of the unmodified model, and figures that add up."""

import json
import mmap
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_runtime.cli.options import Miss, Policy
from moe_runtime.errors import ParityError
from moe_runtime.integrations.transformers.install import POLICIES
from moe_runtime.measure import parity
from moe_runtime.measure.completion import Completion
from moe_runtime.measure.parity import Reference, compare
from moe_runtime.measure.process_memory import peak_resident_bytes, resident_bytes
from moe_runtime.measure.prompt import Prompt
from moe_runtime.scheduling.miss_plan import MissWay
from tests.command_line import run_apart, run_here
from tests.tiny_checkpoint import END, NUM_EXPERTS, NUM_LAYERS, save_mixtral

PROMPTS = ("hello", "a longer prompt\tthan that")
NUM_TOKENS = 12
SLOTS_SHARE = "50%"
MEGABYTE = 2**20

Capsys = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixtral(tmp_path_factory.mktemp("generate") / "model")


def generate(capsys: Capsys, model: Path, *options: str | Path) -> dict[str, Any]:
    """The JSON object of a run that must succeed; nothing else may be on stdout."""
    outcome = run_here(
        capsys, "generate", model, "--json", "--expert-memory", SLOTS_SHARE,
        "--max-new-tokens", str(NUM_TOKENS), *options,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    found: dict[str, Any] = json.loads(outcome.out)
    return found


def prompt_options() -> list[str]:
    return [word for text in PROMPTS for word in ("--prompt", text)]


def expected_ids(model: Path, text: str, **arguments: Any) -> list[int]:
    """New tokens of unmodified transformers."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    unmodified = AutoModelForCausalLM.from_pretrained(model, experts_implementation="eager")
    inputs = tokenizer(text, return_tensors="pt")
    torch.manual_seed(arguments.pop("seed", 0))
    ids = unmodified.generate(**inputs, max_new_tokens=NUM_TOKENS, **arguments)
    new: list[int] = ids[0, inputs["input_ids"].shape[1] :].tolist()
    return new


def test_results_are_those_of_the_unmodified_model_in_input_order(
    capsys: Capsys, model: Path
) -> None:
    found = generate(capsys, model, *prompt_options())
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert [result["index"] for result in found["results"]] == [0, 1]
    assert [result["prompt"] for result in found["results"]] == list(PROMPTS)
    for result in found["results"]:
        assert result["token_ids"] == expected_ids(model, result["prompt"], do_sample=False)
        assert result["text"] == tokenizer.decode(result["token_ids"], skip_special_tokens=True)
        assert result["finish_reason"] == "length"


def test_prediction_is_told_of_and_changes_no_token(capsys: Capsys, model: Path) -> None:
    """Law: expected and realised gain, wasted bytes and the reason stand in JSON and on screen."""
    expected = generate(capsys, model, *prompt_options())
    assert expected["prediction"] == {
        "predictor": None, "mode": "off", "why": "predictor is off",
    }  # fmt: skip
    found = generate(capsys, model, *prompt_options(), "--predictor", "auto", "--no-warm-start")
    assert [r["token_ids"] for r in found["results"]] == [
        r["token_ids"] for r in expected["results"]
    ]
    prediction = found["prediction"]
    assert prediction["predictor"] == "gate_lookahead"
    assert prediction["why"]
    for name in ("expected_gain_ms_per_layer", "realised_gain_ms_per_layer", "wasted_bytes"):
        assert prediction[name] >= 0 or name == "expected_gain_ms_per_layer"
    outcome = run_here(
        capsys, "generate", model, "--expert-memory", SLOTS_SHARE, "--max-new-tokens", "4",
        "--prompt", "hello", "--predictor", "gate_lookahead",
    )  # fmt: skip
    assert outcome.code == 0
    assert "reading ahead" in outcome.out
    outcome = run_here(capsys, "generate", model, "--prompt", "x", "--predictor", "markov")
    assert outcome.code != 0
    assert "predictor 'markov' has to be fitted first" in outcome.err


def test_figures_add_up(capsys: Capsys, model: Path) -> None:
    found = generate(capsys, model, *prompt_options())
    cache, memory = found["cache"], found["memory"]
    assert set(found) == {
        "results", "decode_tokens_per_second", "time_to_first_token_seconds", "cache", "prediction",
        "tiers",
        "memory", "settings", "plan",
    }  # fmt: skip
    assert found["decode_tokens_per_second"] > 0
    assert found["time_to_first_token_seconds"] > 0
    assert cache["policy"] == "lru"
    assert cache["slots"] == NUM_LAYERS * NUM_EXPERTS // 2
    assert cache["hits"] == sum(layer["hits"] for layer in cache["per_layer"])
    assert cache["misses"] == sum(layer["misses"] for layer in cache["per_layer"])
    assert len(cache["per_layer"]) == NUM_LAYERS
    assert cache["hit_rate"] == cache["hits"] / (cache["hits"] + cache["misses"])
    num_tokens = sum(len(result["token_ids"]) for result in found["results"])
    assert cache["bytes_read_per_token"] == cache["bytes_read"] / num_tokens
    assert memory["expert_total_bytes"] == NUM_LAYERS * NUM_EXPERTS * cache["slot_bytes"]
    assert memory["expert_budget_bytes"] == memory["expert_total_bytes"] // 2
    assert memory["dense_bytes"] > 0
    assert (
        MEGABYTE
        < memory["rss_after_imports_bytes"]
        <= memory["load_peak_rss_bytes"]
        <= memory["peak_rss_bytes"]
    )


def test_settings_say_what_ran(capsys: Capsys, model: Path) -> None:
    settings = generate(
        capsys, model, "--prompt", "a", "--policy", "lfu", "--dtype", "bfloat16", "--exact",
        "--seed", "5", "--page-cache", "--max-memory", "cpu=1GiB", "--max-memory", "0=1GiB",
    )["settings"]  # fmt: skip
    expected = {
        "model": str(model), "policy": "lfu", "dtype": "bfloat16", "device": "cpu", "seed": 5,
        "exact": True, "direct_reads": False, "max_new_tokens": NUM_TOKENS,
        "expert_memory": SLOTS_SHARE, "max_memory": {"cpu": "1GiB", "0": "1GiB"},
    }  # fmt: skip
    assert {name: settings[name] for name in expected} == expected


def test_the_policies_are_those_of_the_library() -> None:
    assert {policy.value for policy in Policy} == set(POLICIES)


def test_the_ways_of_a_miss_are_those_of_the_library() -> None:
    assert {way.value for way in Miss} == set(MissWay)


def test_without_a_gpu_there_are_no_tiers(capsys: Capsys, model: Path) -> None:
    """Law: on the CPU `tiers` is null, and settings that need a GPU are said to do nothing."""
    options = ("--prompt", "a", "--device", "cpu", "--miss", "copy", "--json")
    outcome = run_here(capsys, "generate", model, *options)
    assert json.loads(outcome.out)["tiers"] is None
    assert outcome.err.count("host_memory and miss have no effect on the CPU") == 1


def test_sampling_is_that_of_transformers_and_repeatable(capsys: Capsys, model: Path) -> None:
    """Law: prompt `i` is sampled with `seed + i`, whatever ran before it."""
    options = ("--temperature", "1.5", "--top-p", "0.9", "--seed", "7")
    found = generate(capsys, model, *prompt_options(), *options)
    for result in found["results"]:
        assert result["token_ids"] == expected_ids(
            model, result["prompt"], seed=7 + result["index"],
            do_sample=True, temperature=1.5, top_p=0.9,
        )  # fmt: skip
    assert generate(capsys, model, *prompt_options(), *options)["results"] == found["results"]


def test_stop_string_ends_a_prompt(capsys: Capsys, model: Path) -> None:
    (free,) = generate(capsys, model, "--prompt", "hello")["results"]
    stop = next(letter for letter in free["text"][3:] if letter.isascii())
    (stopped,) = generate(capsys, model, "--prompt", "hello", "--stop", stop)["results"]
    assert stopped["finish_reason"] == "stop"
    assert stopped["token_ids"] == free["token_ids"][: len(stopped["token_ids"])]
    assert len(stopped["token_ids"]) < NUM_TOKENS
    assert stopped["text"].endswith(stop)


def test_end_of_sequence_ends_a_prompt(capsys: Capsys, model: Path, tmp_path: Path) -> None:
    (free,) = generate(capsys, model, "--prompt", "hello")["results"]
    copy = Path(shutil.copytree(model, tmp_path / "model"))
    file = copy / "generation_config.json"
    end = free["token_ids"][4]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [0, end]}))
    (ended,) = generate(capsys, copy, "--prompt", "hello")["results"]
    assert ended["finish_reason"] == "stop"
    assert ended["token_ids"] == free["token_ids"][: free["token_ids"].index(end) + 1]


def test_prompts_from_files(capsys: Capsys, model: Path, tmp_path: Path) -> None:
    lines = tmp_path / "prompts.txt"
    lines.write_text("one\n\ntwo: \u00e9\n", encoding="utf-8")
    objects = tmp_path / "prompts.jsonl"
    objects.write_text('{"prompt": "one\\nmore", "id": 3}\n{"prompt": "two"}\n')
    found = generate(capsys, model, "--prompts", lines)
    assert [result["prompt"] for result in found["results"]] == ["one", "two: \u00e9"]
    found = generate(capsys, model, "--prompts", objects)
    assert [result["prompt"] for result in found["results"]] == ["one\nmore", "two"]


def test_chat_wraps_prompts_in_the_template(capsys: Capsys, model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<bot>{% endif %}"
    )
    tokenizer.save_pretrained(copy)
    (result,) = generate(capsys, copy, "--prompt", "hi", "--chat")["results"]
    assert result["prompt"] == "hi"
    assert result["token_ids"] == expected_ids(model, "<user>hi<bot>", do_sample=False)


def test_text_streams_as_it_is_and_a_table_follows(capsys: Capsys, model: Path) -> None:
    (result,) = generate(capsys, model, "--prompt", "hello [bold]")["results"]
    outcome = run_here(
        capsys, "generate", model, "--prompt", "hello [bold]", "--max-new-tokens",
        str(NUM_TOKENS), "--expert-memory", SLOTS_SHARE,
    )  # fmt: skip
    assert outcome.code == 0
    text, _, table = outcome.out.partition("\u250c")
    visible = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in result["text"])
    assert text.strip("\n") == ("\nhello [bold]" + visible.replace("\r", "")).strip("\n")
    for word in ("new tokens", "tokens/s", "time to first token", "hits", "read from disk"):
        assert word in table
    assert "experts of 3 layers" in outcome.err, "the placement is not stated"


def test_a_model_cannot_move_the_cursor(capsys: Capsys, model: Path) -> None:
    """Law: control characters of prompt or model do not reach the terminal."""
    outcome = run_here(
        capsys, "generate", model, "--prompt", "\x1b[2J\x07\x9b31m", "--max-new-tokens", "30"
    )
    assert outcome.code == 0
    assert {c for c in outcome.out if not c.isprintable()} <= {"\n", "\t"}


def test_check_in_a_process_of_its_own(model: Path, tmp_path: Path) -> None:
    """Law: from a shell, with prompts on standard input; stdout holds the object alone."""
    outcome = run_apart(
        "generate", model, "--prompts", "-", "--check", "--json", "--max-new-tokens", "8",
        "--exact", "--expert-memory", SLOTS_SHARE, cwd=tmp_path, stdin="one\ntwo\n",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "Traceback" not in outcome.err
    found = json.loads(outcome.out)
    compared = found["parity"]
    assert "transformers" in compared.pop("reference")
    assert compared == {
        "mode": "exact", "dtype": "float32", "tokens_compared": 16, "identical": True,
        "max_abs_logit_diff": 0.0,
    }  # fmt: skip
    assert END not in found["results"][0]["text"]


def test_fast_check_in_float32(capsys: Capsys, model: Path) -> None:
    """Law: without --exact a float32 model is checked by its greedy tokens."""
    outcome = run_here(
        capsys, "generate", model, "--prompt", "one", "--check", "--json", "--max-new-tokens", "8",
        "--expert-memory", SLOTS_SHARE,
    )  # fmt: skip
    compared = json.loads(outcome.out)["parity"]
    assert (compared["mode"], compared["dtype"]) == ("fast", "float32")
    assert (compared["tokens_compared"], compared["greedy_tokens_equal"]) == (8, True)
    assert (compared["positions"], compared["rms_ratio"]) == (0, None)


def test_fast_check_in_bfloat16(capsys: Capsys, model: Path) -> None:
    """Law: 200 positions of logits are compared with float32, however few tokens were asked for."""
    outcome = run_here(
        capsys, "generate", model, "--prompt", "one", "--check", "--json", "--max-new-tokens", "8",
        "--expert-memory", SLOTS_SHARE, "--dtype", "bfloat16", "--linears",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    compared = json.loads(outcome.out)["parity"]
    assert compared["greedy_tokens_equal"] is True
    assert compared["positions"] >= 200
    assert 0 < compared["rms_distance"] <= 1.1 * compared["eager_rms_distance"]


def test_check_finds_a_difference(capsys: Capsys, model: Path, tmp_path: Path) -> None:
    """Law: results are printed, the exit code is 1 and the sentence says where they differ.

    The reference script is replaced by one that answers with other logits.
    """
    script = tmp_path / "reference.py"
    source = Path(parity.__file__).with_name("reference.py").read_text()
    script.write_text(source.replace("torch.cat(output.logits)", "(torch.cat(output.logits) + 1)"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "_REFERENCE_SCRIPT", script)
        outcome = run_here(
            capsys, "generate", model, "--prompt", "a", "--max-new-tokens", "3", "--check",
            "--json", "--exact",
        )  # fmt: skip
    assert "logits of prompt 0 differ by up to 1" in outcome.error()
    found = json.loads(outcome.out)
    assert found["parity"]["identical"] is False
    assert found["parity"]["max_abs_logit_diff"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("script", "wording"),
    [
        ("import os; os.kill(os.getpid(), 9)", "ran out of memory (killed by signal 9)"),
        ("raise MemoryError", "ran out of memory (MemoryError)"),
        ("raise OSError('no such disk')", "failed (OSError: no such disk)"),
    ],
)
def test_a_check_that_cannot_run_claims_nothing(
    capsys: Capsys, model: Path, tmp_path: Path, script: str, wording: str
) -> None:
    """Law: what was generated is printed all the same."""
    file = tmp_path / "reference.py"
    file.write_text(script)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "_REFERENCE_SCRIPT", file)
        outcome = run_here(
            capsys, "generate", model, "--prompt", "a", "--max-new-tokens", "3", "--check", "--json"
        )
    error = outcome.error()
    assert "no parity verdict" in error
    assert wording in error
    found = json.loads(outcome.out)
    assert found["parity"] is None
    assert len(found["results"][0]["token_ids"]) == 3


def completion(token_ids: list[int], logits: torch.Tensor) -> Completion:
    prompt = Prompt(index=0, text="", token_ids=[1], max_new_tokens=9)
    return Completion(
        prompt=prompt, text="", token_ids=token_ids, finish_reason="length",
        first_token_seconds=1.0, decode_seconds=1.0, logits=logits,
    )  # fmt: skip


def test_comparison_stops_where_the_inputs_differ() -> None:
    """Law: after the first different token the steps saw different text; they are not compared."""
    reference = Reference(folder=Path(), dtype="auto", effective_dtype="float32")
    ours = torch.zeros(4, 3)
    theirs = ours.clone()
    theirs[3] = 9.0
    answer = {"token_ids": torch.tensor([1, 2, 0, 0]), "logits": theirs}
    found = compare([completion([1, 2, 1, 0], ours)], [answer], reference)
    assert (found.tokens_compared, found.identical) == (3, False)
    assert found.max_abs_logit_diff == 0
    assert "token 2 of prompt 0 is 1 and should be 0" in found.difference
    with pytest.raises(ParityError, match="token 2 of prompt 0"):
        found.require()


def test_comparison_of_what_is_not_a_number() -> None:
    """Law: NaN equals NaN in the same place, and nothing else."""
    reference = Reference(folder=Path(), dtype="auto", effective_dtype="float32")
    nan = torch.tensor([[float("nan"), 1.0, float("inf")]])
    answer = {"token_ids": torch.tensor([1]), "logits": nan}
    assert compare([completion([1], nan.clone())], [answer], reference).identical
    found = compare([completion([1], torch.zeros(1, 3))], [answer], reference)
    assert not found.identical
    assert found.max_abs_logit_diff is None


def test_the_reference_imports_nothing_of_ours() -> None:
    source = Path(parity.__file__).with_name("reference.py").read_text()
    imported = [
        line for line in source.splitlines() if line.lstrip().startswith(("import", "from"))
    ]
    assert imported
    assert not [line for line in imported if "moe_runtime" in line]


def test_memory_figures_are_those_of_this_process() -> None:
    before = resident_bytes()
    held = mmap.mmap(-1, 64 * MEGABYTE)  # fresh from the kernel, whatever this process freed before
    for page in range(0, len(held), mmap.PAGESIZE):
        held[page] = 1
    assert resident_bytes() >= before + 60 * MEGABYTE
    assert peak_resident_bytes() >= resident_bytes() - MEGABYTE
    held.close()
    assert peak_resident_bytes() >= before + 60 * MEGABYTE
