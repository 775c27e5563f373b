"""Measures the schedulers of batches and prints the tables of docs/benchmarks/scheduling_*.md.

    moe-runtime predictor train T.npz --predictor token_table -o P.safetensors
    python scripts/bench_scheduling.py --trace T.npz --predictor P.safetensors --part halves

Parts: halves (two batches of 8), queue (a Poisson replay), run (the model itself, needs --model and
--prompts). Judged on the sequences that the predictor was not fitted to.
"""

import argparse
import json
import platform
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_runtime.integrations.transformers.generate_batches import generate_batches
from moe_runtime.integrations.transformers.handle import handle
from moe_runtime.integrations.transformers.load import load
from moe_runtime.measure.bench.machine import git_commit
from moe_runtime.measure.bench.queueing import ServiceTime, poisson_arrivals, replay_queue
from moe_runtime.measure.processor import this_processor
from moe_runtime.measure.prompt import load_tokenizer
from moe_runtime.measure.software_checks import installed_version
from moe_runtime.predictors.counts import membership
from moe_runtime.predictors.predictor import Predictor
from moe_runtime.predictors.split import split_by_sequence
from moe_runtime.predictors.store import load_predictor, split_of
from moe_runtime.scheduling.expected_paths import ExpectedPaths, experts_of
from moe_runtime.scheduling.token_scheduler import activated, split_in_two
from moe_runtime.trace import Phase, Trace

Array = np.ndarray[Any, Any]

BATCH = 8
DRAWS = 400
WAITING_BATCH = 16
LOADS = (0.7, 0.9, 1.0)
PASSES = (0, 1, 4, 16)


def main() -> None:
    """Measure one part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--predictor", type=Path, required=True)
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--model", help="the checkpoint of the trace, for run")
    parser.add_argument("--prompts", type=Path, help="a JSONL file of the trace's prompts, for run")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    packages = ", ".join(f"{n} {installed_version(n)}" for n in ("numpy", "torch", "transformers"))
    print(
        f"{this_processor().model}, {this_processor().usable_cores} cores; Python "
        f"{platform.python_version()}, {packages}; commit {git_commit()}; seed {arguments.seed}\n"
    )
    PARTS[arguments.part](arguments)


def measure_halves(arguments: argparse.Namespace) -> None:
    """Activated experts of two batches of 8 decoded tokens, of 16 sequences."""
    predictor, held_out = _judged(arguments)
    expected_NP, true_NP, sequence_N = _paths(predictor, held_out)
    rng = np.random.default_rng(arguments.seed)
    rows_of = {s: np.flatnonzero(sequence_N == s) for s in np.unique(sequence_N)}
    halves = np.arange(2 * BATCH) >= BATCH
    found = []
    for _ in range(DRAWS):
        sequences = rng.permutation(list(rows_of))[: 2 * BATCH]
        rows = [rng.choice(rows_of[sequence]) for sequence in sequences]
        started = time.perf_counter()
        is_second = split_in_two(expected_NP[rows])
        milliseconds = 1e3 * (time.perf_counter() - started)
        by_true = split_in_two(true_NP[rows])
        true = true_NP[rows]
        costs = [activated(true, chosen) for chosen in (halves, is_second, by_true)]
        found.append((*costs, milliseconds))
    table = np.array(found)
    random, scheduled, oracle, _ = table.mean(0)
    print(f"{predictor.name}; {len(rows_of)} sequences held out, {DRAWS} draws of {2 * BATCH}\n")
    _head("grouped by", "activated experts", "fewer than random")
    for name, value in (("nothing", random), ("expected", scheduled), ("true paths", oracle)):
        print(f"| {name} | {value:.1f} | {1 - value / random:.1%} |")
    spent = np.quantile(table[:, 3], [0.5, 0.99])
    print(f"\n{spent[0]:.2f} ms a unit in the median, {spent[1]:.2f} ms in 99 of 100 units")


def measure_queue(arguments: argparse.Namespace) -> None:
    """Waiting of decoded tokens that arrive at random, one server, batches of up to 16."""
    predictor, held_out = _judged(arguments)
    expected_NP, true_NP, _ = _paths(predictor, held_out)
    order = np.random.default_rng(arguments.seed).permutation(len(true_NP))
    expected_NP, true_NP = expected_NP[order], true_NP[order]
    experts = [experts_of(path, held_out.num_experts) for path in expected_NP]
    service = ServiceTime(fixed_seconds=0.0, expert_seconds=1.0)
    full_seconds = service.of(true_NP[:WAITING_BATCH])
    print(f"{predictor.name}; {len(order)} tokens; a batch takes 1 for each expert it activates\n")
    _head("load", "may pass", "mean wait", "p95 wait", "passed at most", "batch", "experts a batch")
    for load_share in LOADS:
        per_second = load_share * WAITING_BATCH / full_seconds
        arrivals = poisson_arrivals(len(order), per_second, arguments.seed)
        for passes in PASSES:
            found = replay_queue(
                arrivals, true_NP, experts, service, batch_size=WAITING_BATCH, max_passes=passes
            )
            print(
                f"| {load_share} | {passes} | {found.mean_seconds:.0f} | {found.p95_seconds:.0f} "
                f"| {found.max_passes} | {found.batch_size:.1f} | {found.experts_per_batch:.1f} |"
            )


def measure_run(arguments: argparse.Namespace) -> None:
    """Bytes read and tokens a second of `generate_batches`, scheduled and not, in turns."""
    lines = arguments.prompts.read_text().splitlines()[-4 * 2 * BATCH :]
    texts = [json.loads(line)["prompt"] for line in lines]
    tokenizer = load_tokenizer(Path(arguments.model))
    _head("predictor", "tokens/s", "expert bytes a token", "exchanges", "KV bytes moved a token")
    rows: dict[str, list[tuple[float, ...]]] = {"none": [], arguments.predictor.name: []}
    outputs = []
    for _ in range(3):
        for name, predictor in (("none", None), (arguments.predictor.name, arguments.predictor)):
            model = load(arguments.model, expert_memory="35%", dtype="auto")
            with closing(handle(model)) as held:
                started = time.perf_counter()
                found = generate_batches(
                    model, texts, tokenizer=tokenizer, predictor=predictor, max_new_tokens=32
                )
                seconds = time.perf_counter() - started
                tokens = sum(len(sequence.token_ids) for sequence in found.sequences)
                read = held.report()["cache"]["bytes_read"]
            report = found.report
            rows[name].append(
                (
                    tokens / seconds,
                    read / tokens,
                    report.exchanges,
                    report.kv_bytes_copied / tokens,
                )
            )
            outputs.append([sequence.token_ids for sequence in found.sequences])
    for name, values in rows.items():
        rate, read, exchanges, moved = np.median(np.array(values), 0)
        print(f"| {name} | {rate:.1f} | {read:,.0f} | {exchanges:.0f} | {moved:,.0f} |")
    differing = sum(a != b for a, b in zip(outputs[0], outputs[1], strict=True))
    print(f"\n{differing} of {len(texts)} sequences differ ({torch.get_num_threads()} threads)")


PARTS = {"halves": measure_halves, "queue": measure_queue, "run": measure_run}


def _judged(arguments: argparse.Namespace) -> tuple[Predictor, Trace]:
    predictor = load_predictor(arguments.predictor)
    split = split_of(arguments.predictor)
    if split is None:
        raise SystemExit(
            f"{arguments.predictor} was fitted to all sequences; train it with a split"
        )
    return predictor, split_by_sequence(Trace.load(arguments.trace), split)[1]


def _paths(predictor: Predictor, trace: Trace) -> tuple[Array, Array, Array]:
    """Expected and true `[N, P]` of every decoded token, and its sequence."""
    assert trace.token_id is not None
    expected, true, sequences = [], [], []
    for sequence in np.unique(trace.sequence_id).tolist():
        rows = np.flatnonzero((trace.sequence_id == sequence) & (trace.phase != Phase.PADDING))
        is_prompt = trace.phase[rows] == Phase.PREFILL
        paths = ExpectedPaths(predictor)
        paths.of_prompt(sequence, trace.token_id[rows[is_prompt]].tolist())
        for row in rows[~is_prompt].tolist():
            expected.append(paths.of_tokens([(sequence, int(trace.token_id[row]))])[0])
            used = membership(trace.topk[row : row + 1], trace.num_experts) > 0
            true.append(used.reshape(-1))
            sequences.append(sequence)
    return np.stack(expected), np.stack(true), np.array(sequences)


def _head(*names: str) -> None:
    print("| " + " | ".join(names) + " |")
    print("|" + "---|" * len(names))


if __name__ == "__main__":
    main()
