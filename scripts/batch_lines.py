"""The lines of a benchmark of batches: what they ask for, and how much each of them got."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stdlib_prompts import excerpts
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

Lines = list[tuple[list[int], int]]  # token ids of the prompt, new tokens


def write_requests(
    requests: Path,
    folder: Path,
    *,
    num_lines: int,
    prompt_tokens: range,
    new_tokens: range,
    stop: str | None,
    seed: int,
    is_text: bool,
) -> None:
    """Lines of random lengths for the model in `folder`; every other one ends at `stop`.

    Prompts are excerpts of the standard library if `is_text`, and random tokens otherwise.
    """
    draw = random.Random(seed)
    texts = _texts(folder, num_lines, prompt_tokens[-1]) if is_text else None
    vocabulary = AutoConfig.from_pretrained(folder).get_text_config().vocab_size
    with requests.open("w") as file:
        for number in range(num_lines):
            length = draw.choice(prompt_tokens)
            if texts is None:
                prompt = [draw.randrange(100, vocabulary) for _ in range(length)]
            else:
                prompt = next(texts)[:length]
            body = {"prompt": prompt, "max_tokens": draw.choice(new_tokens)}
            if stop is not None and number % 2:
                body["stop"] = stop
            file.write(json.dumps({"custom_id": str(number), "body": body}) + "\n")


def written_lines(requests: Path, results: Path) -> Lines:
    """Each prompt with as many new tokens as `batch` wrote behind it."""
    bodies = {line["custom_id"]: line["response"]["body"] for line in _read(results)}
    asked = sum(1 for _ in _read(requests))
    if len(bodies) < asked:
        raise SystemExit(
            f"{results} has {len(bodies)} of {asked} lines; run batch to its end first"
        )
    return [
        (line["body"]["prompt"], bodies[line["custom_id"]]["usage"]["completion_tokens"])
        for line in _read(requests)
    ]


def num_stopped(results: Path) -> int:
    """Lines that ended before they had all the tokens they asked for."""
    choices = (line["response"]["body"]["choices"][0] for line in _read(results))
    return sum(choice["finish_reason"] == "stop" for choice in choices)


def save_word_tokenizer(folder: Path) -> None:
    """A word for each token, for a checkpoint that has no tokenizer."""
    if (folder / "tokenizer.json").exists():
        return
    vocabulary = AutoConfig.from_pretrained(folder).vocab_size
    words = models.WordLevel({f"t{n}": n for n in range(vocabulary)}, unk_token="t0")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def _texts(folder: Path, number: int, least_tokens: int) -> Iterator[list[int]]:
    """Token ids of excerpts that have so many, of other modules each."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = (tokenizer(text)["input_ids"] for _, text in excerpts(2 * number))
    return (ids for ids in found if len(ids) >= least_tokens)


def _read(path: Path) -> Iterator[dict[str, Any]]:
    return map(json.loads, path.read_text().splitlines())
