"""`moe-runtime batch`: requests in, results out, whatever happens in between."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from moe_runtime.kernels.cpu.attention_status import attention_status
from tests.command_line import Outcome, command, environment, run_here
from tests.tiny_checkpoint import CONTEXT_TOKENS, save_mixtral

Capsys = pytest.CaptureFixture[str]
NUM_LINES = 24
DEMO = Path(__file__).parents[1] / "moe_runtime" / "demo" / "mixtral-stdlib"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixtral(tmp_path_factory.mktemp("batch") / "model")


def write_requests(file: Path, bodies: list[dict[str, Any]]) -> Path:
    lines = [{"custom_id": f"line-{n}", "body": body} for n, body in enumerate(bodies)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def mixed_requests(file: Path) -> Path:
    draw = random.Random(0)
    return write_requests(
        file,
        [
            {
                "prompt": "abc " * draw.randint(1, 8) + str(n),
                "max_tokens": draw.randint(1, 50),
                "temperature": 0.8 * (n % 2),
            }
            for n in range(NUM_LINES)
        ],
    )


def read_results(file: Path) -> dict[str, dict[str, Any]]:
    """By custom_id; every one of them once."""
    records = [json.loads(line) for line in file.read_text().splitlines()]
    found = {record["custom_id"]: record for record in records}
    assert len(found) == len(records)
    return found


def texts(file: Path) -> dict[str, str]:
    return {
        name: record["response"]["body"]["choices"][0]["text"]
        for name, record in read_results(file).items()
    }


def run(capsys: Capsys, model: Path, requests: Path, output: Path, *more: str) -> Outcome:
    return run_here(capsys, "batch", model, requests, "-o", output, "--expert-memory", "50%", *more)


def test_each_line_has_the_answer_that_generate_gives(
    capsys: Capsys, model: Path, tmp_path: Path
) -> None:
    """Law: greedy, in float32; usage counts tokens; a second run has nothing to do."""
    prompts = ["def f(", "x", "a longer prompt, of more than one page of thirty-two tokens"]
    requests = write_requests(
        tmp_path / "r.jsonl", [{"prompt": text, "max_tokens": 20} for text in prompts]
    )
    output = tmp_path / "o.jsonl"
    outcome = run(capsys, model, requests, output, "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert (found["num_lines"], found["num_finished"], found["num_failed"]) == (3, 3, 0)
    assert found["report"]["kv"]["attention"] == attention_status()
    assert found["report"]["passes"]["read_bytes"] > 0
    wanted = [flag for text in prompts for flag in ("--prompt", text)]
    apart = json.loads(
        run_here(
            capsys, "generate", model, *wanted, "--max-new-tokens", "20", "--json",
            "--no-warm-start",
        ).out
    )["results"]  # fmt: skip
    results = read_results(output)
    for n, expected in enumerate(apart):
        answer = results[f"line-{n}"]["response"]["body"]
        assert answer["choices"][0]["text"] == expected["text"]
        assert answer["choices"][0]["finish_reason"] == expected["finish_reason"]
        assert answer["usage"]["completion_tokens"] == len(expected["token_ids"])
        assert answer["usage"]["prompt_tokens"] == len(prompts[n])  # a token a byte
    before = output.read_bytes()
    again = json.loads(run(capsys, model, requests, output, "--json").out)
    assert (again["num_finished"], again["num_skipped"], again["report"]) == (0, 3, None)
    assert output.read_bytes() == before


def test_the_demo_has_the_answers_of_generate_in_two_groups(capsys: Capsys, tmp_path: Path) -> None:
    """Law: greedy, in float32, on trained weights."""
    prompts = ["def read(", "class Path:\n", "import os\n\n\ndef", "for name in "]
    requests = write_requests(
        tmp_path / "r.jsonl", [{"prompt": text, "max_tokens": 24} for text in prompts]
    )
    output = tmp_path / "o.jsonl"
    outcome = run(
        capsys, DEMO, requests, output, "--dtype", "float32", "--token-groups", "2", "--json"
    )
    assert json.loads(outcome.out)["report"]["token_groups"]["passes_in_two"] > 0
    wanted = [flag for text in prompts for flag in ("--prompt", text)]
    apart = json.loads(
        run_here(
            capsys, "generate", DEMO, *wanted, "--max-new-tokens", "24", "--dtype", "float32",
            "--no-warm-start", "--json",
        ).out
    )["results"]  # fmt: skip
    found = texts(output)
    assert [found[f"line-{n}"] for n in range(len(prompts))] == [one["text"] for one in apart]


def test_answers_do_not_depend_on_the_batch(capsys: Capsys, model: Path, tmp_path: Path) -> None:
    """Law: sampling too: each line draws numbers of its own."""
    requests = mixed_requests(tmp_path / "r.jsonl")
    outputs = []
    for most, groups in (("1", "1"), ("5", "1"), ("5", "2"), ("512", "2"), ("512", "auto")):
        outputs.append(tmp_path / f"{most}-{groups}.jsonl")
        outcome = run(
            capsys, model, requests, outputs[-1], "--max-sequences", most,
            "--token-groups", groups, "--json",
        )  # fmt: skip
        assert outcome.code == 0, outcome.err
        found = json.loads(outcome.out)["report"]["token_groups"]
        assert (found["setting"], found["refusal"]) == (groups, None)
        assert groups == "auto" or (found["passes_in_two"] > 0) == (groups == "2")
    first, *others = map(texts, outputs)
    assert len(first) == NUM_LINES
    assert all(other == first for other in others)
    seeded = tmp_path / "seeded.jsonl"
    run(capsys, model, requests, seeded, "--seed", "5")
    differing = {name for name, text in texts(seeded).items() if text != first[name]}
    assert differing
    assert all(int(name.partition("-")[2]) % 2 for name in differing)  # those that sample


def test_dense_layers_that_do_not_fit_are_streamed(
    capsys: Capsys, model: Path, tmp_path: Path
) -> None:
    """Law: the same answers from fewer bytes; the refusal names the smallest budget that works."""
    requests = mixed_requests(tmp_path / "r.jsonl")
    run(capsys, model, requests, tmp_path / "all.jsonl")
    refused = run(capsys, model, requests, tmp_path / "o.jsonl", "--dense-memory", "1KiB")
    assert refused.code == 1
    least = refused.err.split("dense_memory=")[1].split()[0]
    outcome = run(capsys, model, requests, tmp_path / "o.jsonl", "--dense-memory", least, "--json")
    assert outcome.code == 0, outcome.err
    memory = json.loads(outcome.out)["report"]["experts"]["memory"]
    assert memory["dense_used_bytes"] <= int(least) < memory["dense_bytes"]
    assert memory["dense_window"]["bytes_read"] > 0
    assert texts(tmp_path / "o.jsonl") == texts(tmp_path / "all.jsonl")


def test_two_groups_that_would_read_experts_twice_are_one_and_say_why(
    capsys: Capsys, model: Path, tmp_path: Path
) -> None:
    """Law: the same answers, and what would do: in slots, or in dense memory."""
    requests = mixed_requests(tmp_path / "r.jsonl")
    run(capsys, model, requests, tmp_path / "all.jsonl")
    for number, (flags, words) in enumerate(
        (
            (("--expert-memory", "20%"), "hold fewer than the 7 experts of a layer"),
            (("--dense-memory", "90%"), "dense layers are read in every pass"),
        )
    ):
        output = tmp_path / f"{number}.jsonl"
        outcome = run_here(
            capsys, "batch", model, requests, "-o", output, *flags, "--token-groups", "2", "--json"
        )
        assert outcome.code == 0, outcome.err
        assert "passes run as one group of tokens" in outcome.err
        found = json.loads(outcome.out)["report"]["token_groups"]
        assert words in found["refusal"]
        assert (found["groups"], found["passes_in_two"]) == (1, 0)
        assert texts(output) == texts(tmp_path / "all.jsonl")


def test_a_stop_text_ends_a_line_and_is_cut_off(
    capsys: Capsys, model: Path, tmp_path: Path
) -> None:
    body = {"prompt": "def f(", "max_tokens": 40}
    free = write_requests(tmp_path / "free.jsonl", [body])
    run(capsys, model, free, tmp_path / "free.out")
    whole = texts(tmp_path / "free.out")["line-0"]
    stop = whole[5:7]
    held = write_requests(tmp_path / "held.jsonl", [body | {"stop": ["never there", stop]}])
    run(capsys, model, held, tmp_path / "held.out")
    choice = read_results(tmp_path / "held.out")["line-0"]["response"]["body"]["choices"][0]
    assert choice["text"] == whole[: whole.find(stop)]
    assert choice["finish_reason"] == "stop"


def test_bad_lines_are_reported_once_and_the_others_run(
    capsys: Capsys, model: Path, tmp_path: Path
) -> None:
    requests = tmp_path / "r.jsonl"
    good = {"custom_id": "good", "body": {"prompt": "x", "max_tokens": 500}}
    chat = {"custom_id": "chat", "body": {"messages": [{"role": "user", "content": "x"}]}}
    long = {"custom_id": "long", "body": {"prompt": "x" * CONTEXT_TOKENS}}
    foreign = {"custom_id": "foreign", "body": {"prompt": [5, 4000]}}
    empty = {"custom_id": "empty", "body": {"prompt": ""}}
    lines = [json.dumps(one) for one in (good, chat, long, foreign, empty, good)]
    requests.write_text("\n".join([*lines, "{"]))
    output = tmp_path / "o.jsonl"
    for _ in range(2):
        outcome = run(capsys, model, requests, output, "--json")
        assert outcome.code == 0
        assert json.loads(outcome.out)["num_failed"] == 6
        records = [json.loads(line) for line in output.read_text().splitlines()]
        assert len(records) == 7
    codes = {(record["line"], record["error"]["code"]) for record in records if record["error"]}
    assert codes == {
        (2, "invalid_request"),
        (3, "context_length_exceeded"),
        (4, "invalid_request"),
        (5, "empty_prompt"),
        (6, "duplicate_custom_id"),
        (7, "invalid_json"),
    }
    (done,) = (record for record in records if not record["error"])
    # As many tokens as the context leaves, but for the last one, which is not fed back.
    assert done["response"]["body"]["usage"]["total_tokens"] == CONTEXT_TOKENS


def test_too_little_memory_for_keys_is_refused_with_what_would_do(
    capsys: Capsys, model: Path, tmp_path: Path
) -> None:
    """Law: lines that do not fit by themselves fail by name; where none fits, the run does."""
    requests = write_requests(
        tmp_path / "r.jsonl",
        [{"prompt": "x", "max_tokens": 5}, {"prompt": "x" * 40, "max_tokens": 50}],
    )
    output = tmp_path / "o.jsonl"
    page_bytes = json.loads(run(capsys, model, requests, tmp_path / "all", "--json").out)["report"][
        "kv"
    ]["page_bytes"]
    sentence = run(capsys, model, requests, output, "--kv-memory", "10B").error()
    assert "10 B for keys and values are less than the" in sentence
    assert f"set --kv-memory {3 * page_bytes} or more" in sentence
    outcome = run(capsys, model, requests, output, "--kv-memory", f"{page_bytes}B", "--json")
    assert json.loads(outcome.out)["num_failed"] == 1
    results = read_results(output)
    assert results["line-0"]["error"] is None
    assert results["line-1"]["error"]["code"] == "kv_memory_exceeded"
    assert f"set --kv-memory {3 * page_bytes}" in results["line-1"]["error"]["message"]
    enough = run(capsys, model, requests, output, "--kv-memory", f"{3 * page_bytes}B", "--json")
    assert json.loads(enough.out)["num_finished"] == 1  # mended, it runs
    assert "is not a size" in run(capsys, model, requests, output, "--kv-memory", "50%").error()
    huge = run(capsys, model, requests, tmp_path / "new", "--kv-memory", "10TiB")
    assert huge.code == 0  # no more than lines need is taken


def test_settings_of_the_model_that_are_not_heeded_are_named(
    capsys: Capsys, tmp_path: Path
) -> None:
    folder = save_mixtral(tmp_path / "model")
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(
        json.dumps(config | {"repetition_penalty": 1.25})
    )
    requests = write_requests(tmp_path / "r.jsonl", [{"prompt": "x", "max_tokens": 1}])
    outcome = run(capsys, folder, requests, tmp_path / "o.jsonl")
    assert outcome.code == 0
    assert "generate() would heed repetition_penalty=1.25 of" in outcome.err


def test_files_that_cannot_be_used_are_refused(capsys: Capsys, model: Path, tmp_path: Path) -> None:
    requests = mixed_requests(tmp_path / "r.jsonl")
    content = requests.read_bytes()
    assert "is the requests file" in run(capsys, model, requests, requests).error()
    assert requests.read_bytes() == content
    missing = run(capsys, model, tmp_path / "none.jsonl", tmp_path / "o.jsonl")
    assert "cannot be read: No such file" in missing.error()
    assert "there is no folder" in run(capsys, model, requests, tmp_path / "no" / "o").error()


def test_a_killed_run_goes_on_without_repeating_or_losing_a_line(
    capsys: Capsys, model: Path, tmp_path: Path
) -> None:
    """Law: kill -9 at random moments, then the same command: the results of one quiet run."""
    requests = mixed_requests(tmp_path / "r.jsonl")
    whole = tmp_path / "whole.jsonl"
    assert run(capsys, model, requests, whole).code == 0
    output = tmp_path / "o.jsonl"
    draw = random.Random(0)
    arguments = (
        "batch", model, requests, "-o", output, "--expert-memory", "50%", "--token-groups", "2",
    )  # fmt: skip
    kept = []
    for _ in range(2):
        process = subprocess.Popen(
            command(*arguments),
            cwd=tmp_path,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        lines_before = _num_lines(output)
        wanted = lines_before + draw.randint(1, NUM_LINES // 4)
        while process.poll() is None and _num_lines(output) < wanted:
            time.sleep(0.001)
        time.sleep(draw.random() * 0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kept.append(_num_lines(output))
    assert kept[0] < NUM_LINES, "too fast to be killed: nothing was tried"
    with output.open("ab") as torn:  # as a kernel may leave it
        torn.write(b'{"custom_id": "line-')
    outcome = run_here(capsys, *arguments)
    assert outcome.code == 0, outcome.err
    assert texts(output) == texts(whole)


def _num_lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0
