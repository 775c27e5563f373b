"""Measures `moe-runtime batch` beside other ways to answer the same lines; prints one JSON line.

    python scripts/bench_batch.py --model DIR --work DIR --lines 512 --stop TEXT --contestant batch
    python scripts/bench_batch.py --model DIR --work DIR --contestant generate --batch 128

The model is a folder, whose prompts are excerpts of the standard library, or a preset: a random
checkpoint with its shapes, and random prompts. Experts have the same memory whoever runs. `batch`
writes the lines and what became of them to --work; the others run what stands there, each line to
the number of new tokens that `batch` gave it. Each call measures one contestant, loading left out,
between two measurements of the disk:

batch           run_batch(), the engine of `moe-runtime batch`
generate        model.generate() in batches of --batch lines of like length, padded on the left
generate_batch  transformers' continuous batching, on the model that moe_runtime offloads
accelerate      as generate, on transformers' own offload of the experts to disk; as root, its
                memory is capped at what it has after loading, those experts and --spare-gib more
"""

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

from batch_contestants import (
    measure_accelerate,
    measure_batch,
    measure_generate,
    measure_generate_batch,
)
from batch_lines import Lines, num_stopped, save_word_tokenizer, write_requests, written_lines

from moe_runtime.kernels.cpu.attention_status import PAGE_TOKENS
from moe_runtime.measure.bench.machine import git_commit
from moe_runtime.measure.bench.model import make_checkpoint
from moe_runtime.measure.direct_read import measure_direct_read
from moe_runtime.measure.process_memory import peak_resident_bytes
from moe_runtime.measure.processor import this_processor
from moe_runtime.offline.pass_size import MOST_TOKENS
from moe_runtime.perf.lens import LensMachine, LensModel, LensTask, stage_two

PROBE_SECONDS = 1.5
ATTENTION_GBPS = 20.0  # scripts/bench_attention.py; far from the limit at these lengths
OTHERS = {
    "generate": measure_generate,
    "generate_batch": measure_generate_batch,
    "accelerate": measure_accelerate,
}


def main() -> None:
    """Measure one contestant."""
    arguments = _parser().parse_args()
    warnings.simplefilter("ignore")
    folder = Path(arguments.model)
    is_text = folder.is_dir()
    if is_text:
        arguments.layers = None
    else:
        folder = _random_checkpoint(arguments)
    requests, results = arguments.work / "requests.jsonl", arguments.work / "results.jsonl"
    if arguments.contestant == "batch":
        write_requests(
            requests,
            folder,
            num_lines=arguments.lines,
            prompt_tokens=_range(arguments.prompt_tokens),
            new_tokens=_range(arguments.new_tokens),
            stop=arguments.stop,
            seed=arguments.seed,
            is_text=is_text,
        )
    rates = [measure_direct_read(folder, seconds=PROBE_SECONDS).rate_gbps]
    if arguments.contestant == "batch":
        found = measure_batch(arguments, folder, requests, results)
        lines = written_lines(requests, results)
    else:
        lines = written_lines(requests, results)[: arguments.lines]
        found = OTHERS[arguments.contestant](arguments, folder, lines)
    rates.append(measure_direct_read(folder, seconds=PROBE_SECONDS).rate_gbps)
    if arguments.contestant == "batch":
        found |= {"stopped": num_stopped(results), "bound": stage_two_bound(found, lines, rates)}
    new_tokens = sum(new for _, new in lines)
    print(
        json.dumps(
            {name: value for name, value in vars(arguments).items() if name != "work"}
            | {"lines": len(lines), "model": folder.name}
            | found
            | {
                "asked_prompt_tokens": sum(len(prompt) for prompt, _ in lines),
                "new_tokens": new_tokens,
                "new_tokens_per_second": new_tokens / found["seconds"],
                "disk_gbps": rates,
                "peak_resident_bytes": peak_resident_bytes(),
                "processor": this_processor().model,
                "commit": git_commit(),
            }
        )
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a folder, or a preset such as olmoe-1b-7b")
    parser.add_argument("--layers", type=int, default=2, help="of a preset")
    parser.add_argument("--work", type=Path, required=True, help="for lines, results, checkpoints")
    parser.add_argument("--contestant", choices=("batch", *OTHERS), required=True)
    parser.add_argument("--residency", default="35%")
    parser.add_argument("--dense-memory", default="auto", help="of batch")
    parser.add_argument("--lines", type=int, help="others run the first so many of batch's")
    parser.add_argument("--prompt-tokens", default="16-256")
    parser.add_argument("--new-tokens", default="16-256")
    parser.add_argument("--stop", help="a text that ends every other line")
    parser.add_argument("--batch", type=int, default=64, help="lines of one generate()")
    parser.add_argument("--token-groups", choices=("auto", "1", "2"), default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--spare-gib", type=float, default=1.0, help="of accelerate's activations")
    return parser


def _range(text: str) -> range:
    first, last = map(int, text.split("-"))
    return range(first, last + 1)


def _random_checkpoint(arguments: argparse.Namespace) -> Path:
    folder, _ = make_checkpoint(
        arguments.model,
        arguments.work,
        num_layers=arguments.layers,
        routings=[],
        on_progress=lambda done, total: None,
    )
    save_word_tokenizer(folder)
    return folder


def stage_two_bound(found: dict[str, Any], lines: Lines, gbps: list[float]) -> dict[str, float]:
    """MoE-Lens' second stage for what ran, fed with this run's own rates.

    The weights that stream are the experts without a slot; arithmetic runs at the rate that the
    passes themselves were fitted to have, and the cache holds what it held.
    """
    missing_bytes = found["expert_total_bytes"] - found["slots"] * found["expert_bytes"]
    kv, task = found["kv"], _mean_task(lines)
    return {
        name: stage_two(
            # One parameter a token, so that `flops` is two a token: rates are measured ones.
            LensModel(
                parameters=1.0,
                active_parameters=1.0,
                weight_bytes=missing_bytes,
                kv_bytes_per_token=kv["page_bytes"] / PAGE_TOKENS,
            ),
            LensMachine(
                flops=2 / found["computing"]["token_seconds"],
                link_bytes_per_second=link_gbps * 1e9,
                kv_budget_bytes=kv["pages"] * kv["page_bytes"],
                kv_bytes_per_second=ATTENTION_GBPS * 1e9,
            ),
            task,
            block_tokens=PAGE_TOKENS,
            most_tokens_per_pass=MOST_TOKENS,
        ).new_tokens_per_second
        for name, link_gbps in (("slow", min(gbps)), ("fast", max(gbps)))
    }


def _mean_task(lines: Lines) -> LensTask:
    return LensTask(
        prompt_tokens=round(sum(len(prompt) for prompt, _ in lines) / len(lines)),
        new_tokens=round(sum(new for _, new in lines) / len(lines)),
        num_sequences=len(lines),
    )


if __name__ == "__main__":
    main()
