"""The ways to answer the lines of a batch that a benchmark compares, each on a model of its own.

All but `batch` are told what each line came to, and so never compute for a line that has ended.
"""

import os
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from batch_lines import Lines
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.generation.continuous_batching.utils import WorkloadHints

from moe_runtime.integrations.transformers.handle import handle
from moe_runtime.integrations.transformers.load import load
from moe_runtime.integrations.transformers.sites import find_sites
from moe_runtime.measure.batch_request import BatchRequest
from moe_runtime.measure.batch_run import run_batch
from moe_runtime.measure.bench.memory_group import memory_groups
from moe_runtime.measure.bench.page_cache import drop_from_page_cache
from moe_runtime.measure.peers.accelerate_disk import experts_on


def measure_batch(
    arguments: Namespace, folder: Path, requests: Path, results: Path
) -> dict[str, Any]:
    """Ours, with its files."""
    results.unlink(missing_ok=True)
    run = run_batch(
        BatchRequest(
            model=str(folder),
            requests=requests,
            results=results,
            max_tokens=16,
            temperature=0.0,
            seed=0,
            expert_memory=arguments.residency,
            dense_memory=arguments.dense_memory,
            token_groups=arguments.token_groups,
        ),
        _Silent(),
    )
    assert run.report is not None
    experts = run.report["experts"]
    return {
        "seconds": run.seconds,
        "token_groups": run.report["token_groups"],
        "passes": run.report["passes"],
        "n_real": run.report["n_real"],
        "computing": run.report["computing"],
        "kv": run.report["kv"],
        "slots": experts["cache"]["slots"],
        "hits": experts["cache"]["hits"],
        "misses": experts["cache"]["misses"],
        "expert_total_bytes": experts["memory"]["expert_total_bytes"],
        "expert_bytes": experts["memory"]["expert_bytes"],
        "dense_bytes": experts["memory"]["dense_used_bytes"],
    }


def measure_generate(arguments: Namespace, folder: Path, lines: Lines) -> dict[str, Any]:
    """generate() on the model that we offload."""
    model = load(folder, expert_memory=arguments.residency, warm_start=False)
    with closing(handle(model)) as owner:
        seconds = _generate_all(model, lines, arguments.batch)
        return {"seconds": seconds, "read_bytes": owner.engine.bytes_read}


def measure_generate_batch(arguments: Namespace, folder: Path, lines: Lines) -> dict[str, Any]:
    """transformers' continuous batching on the same; what generate_batch() does, but that each
    line has a length of its own."""
    model = load(folder, expert_memory=arguments.residency, warm_start=False)
    with closing(handle(model)) as owner:
        hints = WorkloadHints(
            max_prompt_length=max(len(prompt) for prompt, _ in lines),
            max_generated_length=max(new for _, new in lines),
            num_requests=len(lines),
        )
        started = time.perf_counter()
        with model.continuous_batching_context_manager(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
            timeout=5,
            workload_hints=hints,
        ) as manager:
            for prompt, new in sorted(lines, key=lambda line: -line[1]):
                manager.add_request(prompt, max_new_tokens=new)
            results = []
            while len(results) < len(lines) and manager.is_running():
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    results.append(result)
        seconds = time.perf_counter() - started
        written = sorted(len(result.generated_tokens) for result in results)
        assert written == sorted(new for _, new in lines), "some lines are not whole"
        return {"seconds": seconds, "read_bytes": owner.engine.bytes_read}


def measure_accelerate(arguments: Namespace, folder: Path, lines: Lines) -> dict[str, Any]:
    """transformers' own offload: experts on disk, all else in memory."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    offloaded = arguments.work / "accelerate"
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        device_map=experts_on(skeleton, "disk", rest="cpu"),
        offload_folder=offloaded,
        dtype="auto",
    )
    drop_from_page_cache([offloaded, folder])
    expert_bytes = sum(site.num_experts * site.expert_bytes for site in find_sites(skeleton))
    share_bytes = int(float(arguments.residency.rstrip("%")) / 100 * expert_bytes)
    with _memory_of(share_bytes + int(arguments.spare_gib * 2**30)) as is_capped:
        seconds = _generate_all(model, lines, arguments.batch)
    return {"seconds": seconds, "is_capped": is_capped}


@contextmanager
def _memory_of(num_bytes: int) -> Iterator[bool]:
    """As root: what this process allocates from here on, page cache too, stays within them."""
    with memory_groups() as groups:
        group = None if groups is None else groups.new("accelerate")
        if group is None:
            yield False
            return
        group.add(os.getpid())
        assert group.limit(num_bytes)
        try:
            yield True
        finally:
            (group.folder.parents[1] / "cgroup.procs").write_text(str(os.getpid()))


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


class _Silent:
    """Hears everything and says nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None
