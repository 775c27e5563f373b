"""Measures `moe-runtime batch` beside generate() and generate_batch(), and prints one JSON line.

    python scripts/bench_batch.py --work DIR --contestant batch --layers 2 --lines 128

The model is random, with OLMoE's shapes; experts have the same memory whoever runs. Each call
measures one contestant, loading left out, between two measurements of the disk:

batch           run_batch(), the engine of `moe-runtime batch`
generate        model.generate() in batches of --batch lines of like length, padded on the left
generate_batch  transformers' continuous batching, on the model that moe_runtime offloads
accelerate      as generate, on transformers' own offload of the experts to disk; as root, its
                memory is capped at what it has after loading, those experts and --spare-gib more
"""

import argparse
import json
import os
import random
import time
import warnings
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from moe_runtime.integrations.transformers.handle import handle
from moe_runtime.integrations.transformers.load import load
from moe_runtime.integrations.transformers.sites import find_sites
from moe_runtime.kernels.cpu.attention_status import PAGE_TOKENS
from moe_runtime.measure.batch_request import BatchRequest
from moe_runtime.measure.batch_run import run_batch
from moe_runtime.measure.bench.machine import git_commit
from moe_runtime.measure.bench.memory_group import memory_groups
from moe_runtime.measure.bench.model import make_checkpoint
from moe_runtime.measure.direct_read import measure_direct_read
from moe_runtime.measure.peers.accelerate_disk import experts_on
from moe_runtime.measure.process_memory import peak_resident_bytes
from moe_runtime.measure.processor import this_processor
from moe_runtime.offline.pass_size import MOST_TOKENS
from moe_runtime.perf.lens import LensMachine, LensModel, LensTask, stage_two

PROBE_SECONDS = 1.5
ATTENTION_GBPS = 20.0  # scripts/bench_attention.py; far from the limit at these lengths

Lines = list[tuple[list[int], int]]  # prompt, new tokens


class _Silent:
    """Hears everything and says nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


def main() -> None:
    """Measure one contestant."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="where the checkpoint is, or goes")
    parser.add_argument("--contestant", choices=CONTESTANTS, required=True)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--residency", default="35%")
    parser.add_argument("--lines", type=int, default=128)
    parser.add_argument("--prompt-tokens", default="16-64")
    parser.add_argument("--new-tokens", default="8-32")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--token-groups", choices=("auto", "1", "2"), default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--spare-gib", type=float, default=1.0, help="of accelerate's activations")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    folder, _ = make_checkpoint(
        "olmoe-1b-7b",
        arguments.work,
        num_layers=arguments.layers,
        routings=[],
        on_progress=lambda done, total: None,
    )
    draw = random.Random(arguments.seed)
    prompts, answers = (
        tuple(map(int, text.split("-"))) for text in (arguments.prompt_tokens, arguments.new_tokens)
    )
    lines = [
        (
            [draw.randrange(100, 50000) for _ in range(draw.randint(*prompts))],
            draw.randint(*answers),
        )
        for _ in range(arguments.lines)
    ]
    rates = [measure_direct_read(folder, seconds=PROBE_SECONDS).rate_gbps]
    found = CONTESTANTS[arguments.contestant](arguments, folder, lines)
    rates.append(measure_direct_read(folder, seconds=PROBE_SECONDS).rate_gbps)
    if arguments.contestant == "batch":
        found["bound"] = stage_two_bound(found, lines, min(rates), max(rates))
    new_tokens = found.setdefault("new_tokens", sum(new for _, new in lines))
    print(
        json.dumps(
            {name: value for name, value in vars(arguments).items() if name != "work"}
            | found
            | {
                "disk_gbps": rates,
                "new_tokens_per_second": new_tokens / found["seconds"],
                "peak_resident_bytes": peak_resident_bytes(),
                "processor": this_processor().model,
                "commit": git_commit(),
            }
        )
    )


def measure_batch(arguments: argparse.Namespace, folder: Path, lines: Lines) -> dict[str, Any]:
    """Ours, with its files: half of the lines look for a stop text."""
    _save_tokenizer(folder)
    requests, results = arguments.work / "requests.jsonl", arguments.work / "results.jsonl"
    results.unlink(missing_ok=True)
    bodies = [
        {"prompt": prompt, "max_tokens": new} | ({"stop": "never"} if number % 2 else {})
        for number, (prompt, new) in enumerate(lines)
    ]
    requests.write_text(
        "".join(json.dumps({"custom_id": str(n), "body": b}) + "\n" for n, b in enumerate(bodies))
    )
    run = run_batch(
        BatchRequest(
            model=str(folder),
            requests=requests,
            results=results,
            max_tokens=16,
            temperature=0.0,
            seed=0,
            expert_memory=arguments.residency,
            token_groups=arguments.token_groups,
        ),
        _Silent(),
    )
    assert run.report is not None
    cache = run.report["experts"]["cache"]
    return {
        "seconds": run.seconds,
        "token_groups": run.report["token_groups"],
        "new_tokens": run.new_tokens,  # a line may write the token that ends it
        "passes": run.report["passes"],
        "n_real": run.report["n_real"],
        "computing": run.report["computing"],
        "slots": cache["slots"],
        "kv": run.report["kv"],
        "hits": cache["hits"],
        "misses": cache["misses"],
        "expert_total_bytes": run.report["experts"]["memory"]["expert_total_bytes"],
        "expert_bytes": run.report["experts"]["memory"]["expert_bytes"],
    }


def stage_two_bound(
    found: dict[str, Any], lines: Lines, lowest_gbps: float, highest_gbps: float
) -> dict[str, Any]:
    """MoE-Lens' second stage for what ran, fed with this run's own rates.

    The weights that stream are the experts without a slot; arithmetic runs at the rate that the
    passes themselves were fitted to have, and the cache holds what it held.
    """
    missing_bytes = found["expert_total_bytes"] - found["slots"] * found["expert_bytes"]
    kv, task = found["kv"], _mean_task(lines)
    bounds = {}
    for name, link_gbps in (("slow", lowest_gbps), ("fast", highest_gbps)):
        bounds[name] = stage_two(
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
    return bounds


def _mean_task(lines: Lines) -> LensTask:
    return LensTask(
        prompt_tokens=round(sum(len(prompt) for prompt, _ in lines) / len(lines)),
        new_tokens=round(sum(new for _, new in lines) / len(lines)),
        num_sequences=len(lines),
    )


def measure_generate(arguments: argparse.Namespace, folder: Path, lines: Lines) -> dict[str, Any]:
    """generate() on the offloaded model."""
    model = load(folder, expert_memory=arguments.residency, warm_start=False)
    with closing(handle(model)) as owner:
        seconds = _generate_all(model, lines, arguments.batch)
        return {"seconds": seconds, "read_bytes": owner.engine.bytes_read}


def measure_generate_batch(
    arguments: argparse.Namespace, folder: Path, lines: Lines
) -> dict[str, Any]:
    """transformers' continuous batching, with one length of answers for all lines of a call."""
    model = load(folder, expert_memory=arguments.residency, warm_start=False)
    with closing(handle(model)) as owner:
        # It takes one length for all lines: groups of like lengths waste least.
        groups: dict[int, list[list[int]]] = {}
        for prompt, new in sorted(lines, key=lambda line: line[1]):
            groups.setdefault(-(-new // 8) * 8, []).append(prompt)
        started = time.perf_counter()
        for new, prompts in groups.items():
            model.generate_batch(
                prompts,
                generation_config=GenerationConfig(
                    max_new_tokens=new, do_sample=False, eos_token_id=-1
                ),
                progress_bar=False,
            )
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "read_bytes": owner.engine.bytes_read}


def measure_accelerate(arguments: argparse.Namespace, folder: Path, lines: Lines) -> dict[str, Any]:
    """transformers' own offload: experts on disk, all else in memory."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        device_map=experts_on(skeleton, "disk", rest="cpu"),
        offload_folder=arguments.work / "accelerate",
        dtype="auto",
    )
    expert_bytes = sum(site.num_experts * site.expert_bytes for site in find_sites(skeleton))
    share_bytes = int(float(arguments.residency.rstrip("%")) / 100 * expert_bytes)
    with memory_groups() as groups:
        group = None if groups is None else groups.new("accelerate")
        if group is not None:  # what is allocated from here on counts, page cache too
            group.add(os.getpid())
            assert group.limit(share_bytes + int(arguments.spare_gib * 2**30))
        try:
            seconds = _generate_all(model, lines, arguments.batch)
        finally:
            if group is not None:
                (group.folder.parents[1] / "cgroup.procs").write_text(str(os.getpid()))
    return {"seconds": seconds, "is_capped": group is not None}


def _generate_all(model: Any, lines: Lines, batch: int) -> float:
    """Batches of lines whose answers are of like length, so that few rows wait for others."""
    order = sorted(lines, key=lambda line: (line[1], len(line[0])))
    started = time.perf_counter()
    for begin in range(0, len(order), batch):
        some = order[begin : begin + batch]
        width = max(len(prompt) for prompt, _ in some)
        ids = torch.zeros(len(some), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, (prompt, _) in enumerate(some):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        new = max(new for _, new in some)
        model.generate(
            ids, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
    return time.perf_counter() - started


def _save_tokenizer(folder: Path) -> None:
    """A word for each token."""
    if (folder / "tokenizer.json").exists():
        return
    tokenizer = Tokenizer(models.WordLevel({f"t{n}": n for n in range(50304)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


CONTESTANTS = {
    "batch": measure_batch,
    "generate": measure_generate,
    "generate_batch": measure_generate_batch,
    "accelerate": measure_accelerate,
}

if __name__ == "__main__":
    main()
