"""Measures how far predictions are from the clock, cell by cell, and fits what no rate explains.

    python scripts/bench_model.py cells RESULTS.jsonl --model mixtral-stdlib --runs 4
    python scripts/bench_model.py table RESULTS.jsonl
    python scripts/bench_model.py fit RESULTS.jsonl

A result is one line, and what a file holds already is not measured again: stop it at any time, and
call it until it has nothing to do. Each call is one process. `--seconds` ends it after the run that
is under way. `table` predicts each run from the rates around it, with the model as it is now. `fit`
measures a small random model that is no cell's, and prints the overheads of a step.
"""

import argparse
import json
import os
import statistics
import time
import warnings
from collections import Counter, defaultdict
from contextlib import closing
from dataclasses import fields
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from plan_cells import (
    DEFAULTS,
    FIT_MODEL,
    MOST_OTHERS_CORES,
    PLAN,
    TIMED_SEED,
    WARM_STEPS,
    Cell,
    Surroundings,
    append,
    cells,
    curves_of,
    folder_of,
    load,
    machine_of,
    read,
    time_text,
)
from scipy.optimize import least_squares

import moe_runtime
from moe_runtime.integrations.transformers.progress import quiet_transformers
from moe_runtime.integrations.transformers.spec_reader import spec_of_folder
from moe_runtime.measure.probe.other_load import OtherLoad
from moe_runtime.model_spec import ModelSpec
from moe_runtime.perf.hit_curve import HitCurve
from moe_runtime.perf.latency import MOST_KERNEL_ROWS, ExpertForm, LatencyModel, Setup
from moe_runtime.perf.overheads import CPU_OVERHEADS, Overheads
from moe_runtime.perf.rates import Rates

# Of a run between which the memory's rate changes, or beside which others run; the last one counts.
MOST_TRIES = 5
FIT_BATCHES = (1, 4, 8, 64)
COSTS = [field.name for field in fields(Overheads)]


class Predictions:
    """What the model says today of runs that were measured, from the rates around each of them."""

    def __init__(self, work: Path) -> None:
        self._work = work

    def tokens_per_second(self, run: dict[str, Any]) -> float:
        return float(run["batch"] / self.seconds(run, CPU_OVERHEADS))

    def shares(self, run: dict[str, Any]) -> tuple[float, list[float]]:
        """Seconds of a step without overheads, and by how much one second of each adds to it."""
        none = dict.fromkeys(COSTS, 0.0)
        lanes = self.seconds(run, Overheads(**none))
        counts = [self.seconds(run, Overheads(**none | {name: 1.0})) - lanes for name in COSTS]
        return lanes, counts

    def seconds(self, run: dict[str, Any], overheads: Overheads) -> float:
        """Of one step in the middle of those that are timed."""
        cell, settings = Cell.named(run["cell"]), run["settings"]
        spec, curves = self._model_of(cell)
        setup = Setup(
            form=ExpertForm.all_of(spec)[0],
            num_slots=run["slots"],
            num_host_slots=0,
            batch=cell.batch,
            context_tokens=cell.prompt_tokens + (WARM_STEPS + PLAN["new_tokens"]) // 2,
            policy=settings["policy"],
            linears=settings["linears"],
            reads_ahead=settings["predictor"] != "off",
            page_cache=settings["page_cache"],
        )
        machine = machine_of(run, spec.expert_bytes)
        rates = Rates.of(machine, value_bytes=spec.value_bytes, read_bytes=spec.expert_bytes)
        return LatencyModel(spec, rates, curves, overheads=overheads).step(setup).seconds

    @cache  # noqa: B019  # as long as the program
    def _model_of(self, cell: Cell) -> tuple[ModelSpec, dict[str, HitCurve]]:
        folder = folder_of(cell.model, self._work)
        return spec_of_folder(folder), curves_of(folder, cell, self._work)


def run_once(
    model: Any,
    surroundings: Surroundings,
    cell: Cell,
    folder: Path,
    settings: dict[str, Any],
    seed: int,
) -> dict[str, Any]:
    """One text, with the machine's rates before and after it."""
    for _ in range(MOST_TRIES):
        others = OtherLoad()
        before = surroundings.memory_gbps()
        timing = time_text(model, folder, cell, settings["threads"], seed, surroundings.disk_gbps)
        after = surroundings.memory_gbps()
        others_cores = others.cores()
        low, high = sorted((before, after))
        if high / low - 1 <= PLAN["most_drift"] and others_cores <= MOST_OTHERS_CORES:
            break
    return {
        "cell": cell.name,
        "batch": cell.batch,
        "slots": moe_runtime.handle(model).budget.num_slots,
        "settings": settings,
        "process": os.getpid(),
        "measured": timing.tokens_per_second,
        "memory_gbps": [before, after],
        "disk_gbps": timing.disk_gbps,
        "operator_nanoseconds": timing.operator_nanoseconds,
        "drift": high / low - 1,
        "others_cores": others_cores,
    }


def measure_cells(arguments: argparse.Namespace) -> None:
    end = time.monotonic() + arguments.seconds
    predictions = Predictions(arguments.work)
    for cell in cells(arguments.model, arguments.residency, arguments.batch):
        done = sum(one["cell"] == cell.name for one in read(arguments.results))
        here = min(arguments.runs, PLAN["runs"] + 1 - done)
        if here <= 0:
            continue
        if time.monotonic() > end:
            return
        folder = folder_of(cell.model, arguments.work)
        curves_of(folder, cell, arguments.work)
        model = load(folder, cell, DEFAULTS)
        with closing(moe_runtime.handle(model)), Surroundings.of(folder) as surroundings:
            for number in range(done, done + here):
                if time.monotonic() > end:
                    return
                about = (cell, folder, DEFAULTS, TIMED_SEED + number)
                found = run_once(model, surroundings, *about)
                append(arguments.results, found)
                expected = predictions.tokens_per_second(found)
                measured = found["measured"]
                print(f"{cell.name}: {measured:.4g} measured, {expected:.4g} predicted", flush=True)


def fit(arguments: argparse.Namespace) -> None:
    """Robust least squares, none below zero, of what is left when a step's lanes are taken away."""
    folder = folder_of(FIT_MODEL, arguments.work)
    end = time.monotonic() + arguments.seconds
    for linears, share in product((False, True), (100, 50, 25)):
        settings = {**DEFAULTS, "linears": linears}
        batches = [batch for batch in FIT_BATCHES if not linears or batch <= MOST_KERNEL_ROWS]
        texts = list(product(batches, (256, 32)))
        known = Counter(key(one["cell"], one["settings"]) for one in read(arguments.results))
        kinds = [Cell(FIT_MODEL, share, *text) for text in texts]
        left = [cell for cell in kinds if known[key(cell.name, settings)] < arguments.runs]
        if not left:
            continue
        model = load(folder, left[0], settings)
        with closing(moe_runtime.handle(model)), Surroundings.of(folder) as surroundings:
            for cell in left:
                if time.monotonic() > end:
                    return
                seed = TIMED_SEED + known[key(cell.name, settings)]
                about = (cell, folder, settings, seed)
                append(arguments.results, run_once(model, surroundings, *about))
    show_fit(arguments)


def key(cell: str, settings: dict[str, Any]) -> str:
    return cell + json.dumps(settings, sort_keys=True)


def show_fit(arguments: argparse.Namespace) -> None:
    rows, rests = [], []
    predictions = Predictions(arguments.work)
    for one in read(arguments.results):
        if one["others_cores"] <= MOST_OTHERS_CORES:
            seconds = one["batch"] / one["measured"]
            lane_seconds, counts = predictions.shares(one)
            # In shares of the step: each run counts alike.
            rows.append([count / seconds for count in counts])
            rests.append(1 - lane_seconds / seconds)
    matrix, rest = np.array(rows), np.array(rests)
    # A run that something disturbed must not decide: its excess counts once, not squared.
    costs = least_squares(
        lambda costs: matrix @ costs - rest,
        np.full(matrix.shape[1], 1e-6),
        bounds=(0, np.inf),
        loss="soft_l1",
        f_scale=0.05,
        x_scale="jac",
    ).x
    for name, cost in zip(COSTS, costs, strict=True):
        print(f"{name}={cost:.3e}")
    left = np.abs(matrix @ costs - rest)
    print(f"{len(rests)} runs, median error {np.median(left):.1%}, worst {left.max():.1%}")


def show_table(arguments: argparse.Namespace) -> None:
    groups = defaultdict(list)
    predictions = Predictions(arguments.work)
    for one in read(arguments.results):
        groups[one["cell"]].append(one)
    print("| cell | runs, processes | tokens/s, measured | spread | predicted | error |")
    print("|---|---|---|---|---|---|")
    errors = []
    for name, runs in groups.items():
        rates = sorted(one["measured"] for one in runs)
        middle = statistics.median(rates)
        expected = statistics.median(predictions.tokens_per_second(one) for one in runs)
        errors.append(abs(expected / middle - 1))
        print(
            f"| {name} | {len(runs)}, {len({one['process'] for one in runs})} | {middle:.4g} | "
            f"{rates[0]:.4g} to {rates[-1]:.4g} | {expected:.4g} | {expected / middle - 1:+.1%} |"
        )
    if errors:
        print(f"\n{len(errors)} cells: median error {statistics.median(errors):.1%}, "
              f"worst {max(errors):.1%}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["cells", "table", "fit"])
    parser.add_argument("results", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--residency", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument(
        "--runs", type=int, default=4, help="of a cell, in this process; of a fit, in all"
    )
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--work", type=Path, default=Path("bench_model"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    arguments.work.mkdir(exist_ok=True)
    run = {"fit": fit, "cells": measure_cells, "table": show_table}
    with quiet_transformers(lambda done, total: None):
        run[arguments.what](arguments)


if __name__ == "__main__":
    main()
