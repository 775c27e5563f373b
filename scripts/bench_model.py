"""Measures how far predictions are from the clock, cell by cell, and how good chosen plans are.

    python scripts/bench_model.py cells RESULTS.jsonl --model mixtral-stdlib --runs 4
    python scripts/bench_model.py regret RESULTS.jsonl --model mixtral-stdlib --residency 50
    python scripts/bench_model.py table RESULTS.jsonl
    python scripts/bench_model.py fit RESULTS.jsonl

Cells and the grid of settings are those of docs/benchmarks/plan_cells.yaml. A result is one line,
and what a file holds already is not measured again: stop it at any time, and call it until it has
nothing to do. Each call is one process. `--seconds` ends it after the run that is under way. `fit`
measures a small random model that is no cell's, and prints the overheads of a step.
"""

import argparse
import json
import os
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from scipy.optimize import least_squares

import moe_runtime
from moe_runtime.integrations.transformers.progress import quiet_transformers
from moe_runtime.integrations.transformers.spec_reader import spec_of_folder
from moe_runtime.measure.bench.presets import load_preset
from moe_runtime.measure.bench.random_checkpoint import write_random_checkpoint
from moe_runtime.measure.routing_recorder import RoutingRecorder
from moe_runtime.measure.this_machine import this_machine
from moe_runtime.perf.hardware import Hardware
from moe_runtime.perf.hardware_presets import load_hardware_preset
from moe_runtime.perf.hit_curve import HitCurve
from moe_runtime.perf.latency import (
    MOST_KERNEL_ROWS,
    ExpertForm,
    LatencyModel,
    Setup,
)
from moe_runtime.perf.overheads import Overheads
from moe_runtime.perf.plan import PlanRequest
from moe_runtime.perf.planner import make_plan
from moe_runtime.perf.rates import Rates
from moe_runtime.perf.remedies import scaled_disk, scaled_memory
from moe_runtime.simulate.hit_rates import hit_curve
from moe_runtime.trace import Phase, Trace
from moe_runtime.trace_writer import TraceWriter

ROOT = Path(__file__).resolve().parents[1]
CELLS = ROOT / "docs" / "benchmarks" / "plan_cells.yaml"
DEMO = ROOT / "moe_runtime" / "demo" / "mixtral-stdlib"
PLAN = yaml.safe_load(CELLS.read_text())
DEFAULTS = {name: values[0] for name, values in PLAN["grid"].items()}
WARM_STEPS = 8
MOST_TRIES = 4  # of a run between which the memory's rate changes; the last one counts, marked
# Tokens of the routing that hit rates come from are others than those that are timed.
TIMED_SEED, CURVE_SEED = 1, 2
FIT_MODEL = "fit"
FIT_SHAPES = {
    "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 6, "num_local_experts": 16,
    "num_attention_heads": 8, "num_key_value_heads": 4,
}  # fmt: skip
NO_OVERHEADS = Overheads(
    layer_seconds=0,
    kernel_layer_seconds=0,
    miss_seconds=0,
    row_seconds=0,
    attention_flop_seconds=0,
)


@dataclass(frozen=True)
class Cell:
    """What runs: `residency` in per cent."""

    model: str
    residency: int
    batch: int
    prompt_tokens: int

    @property
    def name(self) -> str:
        return f"{self.model} {self.residency}% batch {self.batch} prompt {self.prompt_tokens}"


def cells(model: str | None, residency: int | None) -> Iterator[Cell]:
    for entry, share, batch, prompt in product(
        PLAN["models"], PLAN["residency"], PLAN["batch"], PLAN["prompt_tokens"]
    ):
        if model in (None, entry["name"]) and residency in (None, share):
            yield Cell(entry["name"], share, batch, prompt)


def folder_of(model: str, work: Path) -> Path:
    """The bundled checkpoint, or a random one with the shapes of a preset, made once."""
    if model == FIT_MODEL:
        tiny = load_preset("tiny")
        small = replace(tiny, fields={**tiny.fields, **FIT_SHAPES})
        return write_random_checkpoint(small, work / FIT_MODEL)
    entry = next(entry for entry in PLAN["models"] if entry["name"] == model)
    if entry["preset"] is None:
        return DEMO
    preset = load_preset(entry["preset"])
    folder = work / f"{model}-{entry['num_layers']}-layers"
    return write_random_checkpoint(preset, folder, num_layers=entry["num_layers"])


def forced_tokens(folder: Path, cell: Cell, seed: int) -> torch.Tensor:
    """`[batch, prompt + new]` token ids, evenly drawn."""
    spec = spec_of_folder(folder)
    generator = torch.Generator().manual_seed(seed)
    shape = (cell.batch, cell.prompt_tokens + PLAN["new_tokens"])
    return torch.randint(spec.vocab_size, shape, generator=generator)


@torch.no_grad()
def decode(model: Any, tokens: torch.Tensor, cell: Cell) -> list[float]:
    """Seconds of each step after the prompt."""
    output = model(input_ids=tokens[:, : cell.prompt_tokens], use_cache=True, logits_to_keep=1)
    seconds = []
    for step in range(cell.prompt_tokens, tokens.shape[1]):
        start = time.perf_counter()
        output = model(
            input_ids=tokens[:, step : step + 1],
            past_key_values=output.past_key_values,
            use_cache=True,
        )
        seconds.append(time.perf_counter() - start)
    return seconds


def curve_of(folder: Path, cell: Cell, work: Path) -> HitCurve:
    """Simulated on the routing of other tokens, decoded in the same batch."""
    path = work / f"routing-{cell.model}-{cell.batch}.npz"
    if not path.is_file():
        model = moe_runtime.load(folder, warm_start=False)
        writer = TraceWriter(path)
        tokens = forced_tokens(folder, replace(cell, prompt_tokens=16), CURVE_SEED)
        with closing(moe_runtime.handle(model)), RoutingRecorder(model, writer, name=cell.model):
            decode(model, tokens, replace(cell, prompt_tokens=16))
        writer.close()
    trace = Trace.load(path)
    decoded = trace.select((trace.phase == Phase.DECODE).nonzero()[0])
    return hit_curve(decoded, batch=cell.batch, is_own=True)


def machine_between(before: Hardware, after: Hardware) -> Hardware:
    """The probed file of this machine, scaled to the rates around a run."""
    base = load_hardware_preset("2-core-epyc")
    read = statistics.mean(one.memory.read_gbps for one in (before, after))
    scaled = scaled_memory(base, read / base.memory.read_gbps)
    if before.disk is None or after.disk is None or base.disk is None:
        return scaled
    rate = statistics.mean(one.disk.best.gbps for one in (before, after) if one.disk)
    size = before.disk.best.block_bytes
    probed = max(one.gbps for one in base.disk.reads if one.block_bytes == size)
    return replace(scaled, disk=scaled_disk(base.disk, rate / probed))


def predicted_seconds(
    folder: Path,
    cell: Cell,
    num_slots: int,
    machine: Hardware,
    curve: HitCurve,
    settings: dict[str, Any],
    overheads: Overheads | None,
) -> tuple[float, dict[str, float]]:
    """Of one step in the middle of those that are timed; and what its overheads depend on."""
    spec = spec_of_folder(folder)
    rates = Rates.of(machine, value_bytes=spec.value_bytes, read_bytes=spec.expert_bytes)
    setup = Setup(
        form=ExpertForm.all_of(spec)[0],
        num_slots=num_slots,
        num_host_slots=0,
        batch=cell.batch,
        context_tokens=cell.prompt_tokens + (WARM_STEPS + PLAN["new_tokens"]) // 2,
        policy=settings.get("policy", "lru"),
        linears=settings.get("linears", False),
        reads_ahead=settings.get("predictor", "off") != "off",
    )
    step = LatencyModel(spec, rates, curve, overheads=overheads).step(setup)
    features = {
        "layers": len(spec.layers),
        "missed": step.missed_experts,
        "attention_flops": cell.batch * spec.attention_flops(setup.context_tokens),
    }
    return step.seconds, features


def run_once(
    folder: Path,
    cell: Cell,
    work: Path,
    settings: dict[str, Any],
    overheads: Overheads | None = None,
) -> dict[str, Any]:
    """One run, with the machine's rates before and after it."""
    curve = curve_of(folder, cell, work)
    options = {name: value for name, value in settings.items() if name != "threads"}
    torch.set_num_threads(settings["threads"])
    tokens = forced_tokens(folder, cell, TIMED_SEED)
    for _ in range(MOST_TRIES):
        model = moe_runtime.load(
            folder, expert_memory=f"{cell.residency}%", warm_start=False, **options
        )
        with closing(moe_runtime.handle(model)) as handle:
            before = this_machine(folder)
            seconds = decode(model, tokens, cell)
            after = this_machine(folder)
            num_slots = handle.budget.num_slots
            hit_rate = handle.report()["cache"]["hit_rate"]
        low, high = sorted((before.memory.read_gbps, after.memory.read_gbps))
        drift = high / low - 1
        if drift <= PLAN["most_drift"]:
            break
    step = statistics.median(seconds[WARM_STEPS:])
    machine = machine_between(before, after)
    expected, features = predicted_seconds(
        folder, cell, num_slots, machine, curve, settings, overheads
    )
    return {
        "cell": cell.name,
        "batch": cell.batch,
        "features": features,
        "settings": settings,
        "process": os.getpid(),
        "measured": cell.batch / step,
        "predicted": cell.batch / expected,
        "read_gbps": [before.memory.read_gbps, after.memory.read_gbps],
        "drift": drift,
        "hit_rate_with_prompt": hit_rate,
    }


def measure_cells(arguments: argparse.Namespace) -> None:
    end = time.monotonic() + arguments.seconds
    results = read(arguments.results)
    for cell in cells(arguments.model, arguments.residency):
        folder = folder_of(cell.model, arguments.work)
        done = sum(one["cell"] == cell.name and one["settings"] == DEFAULTS for one in results)
        here = min(arguments.runs, PLAN["runs"] + 1 - done)
        for _ in range(max(0, here)):
            if time.monotonic() > end:
                return
            append(arguments.results, run_once(folder, cell, arguments.work, DEFAULTS))


def measure_regret(arguments: argparse.Namespace) -> None:
    """Every setting of the grid once, and the chosen one; then the best three with it, in turns."""
    end = time.monotonic() + arguments.seconds
    names = list(PLAN["grid"])
    grid = [dict(zip(names, values, strict=True)) for values in product(*PLAN["grid"].values())]
    for cell in cells(arguments.model, arguments.residency):
        folder = folder_of(cell.model, arguments.work)
        chosen = DEFAULTS | chosen_settings(folder, cell)
        results = [one for one in read(arguments.results) if one["cell"] == cell.name]
        for settings in grid:
            if any(one["settings"] == settings for one in results):
                continue
            if time.monotonic() > end:
                return
            append(arguments.results, run_once(folder, cell, arguments.work, settings))
        results = [one for one in read(arguments.results) if one["cell"] == cell.name]
        first = {json.dumps(one["settings"]): one["measured"] for one in reversed(results)}
        best = sorted(grid, key=lambda one: -first.get(json.dumps(one), 0))[:3]
        for _ in range(arguments.pairs):
            for settings in [*best, chosen, DEFAULTS]:
                if time.monotonic() > end:
                    return
                found = run_once(folder, cell, arguments.work, settings)
                append(arguments.results, found | {"is_pair": True, "chosen": chosen})


def chosen_settings(folder: Path, cell: Cell) -> dict[str, Any]:
    """What a plan takes, of the settings in the grid, before anything is tried."""
    spec = spec_of_folder(folder)
    plan = make_plan(
        PlanRequest(
            spec=spec,
            hardware=this_machine(folder),
            batch=cell.batch,
            prompt_tokens=cell.prompt_tokens,
            new_tokens=PLAN["new_tokens"],
            expert_memory_bytes=cell.residency * spec.expert_total_bytes // 100,
        )
    )
    settings = plan.chosen.settings
    return {name: getattr(settings, name) for name in ("policy", "linears", "predictor", "threads")}


def fit(arguments: argparse.Namespace) -> None:
    """Robust least squares, none below zero, of what is left when a step's lanes are taken away."""
    folder = folder_of(FIT_MODEL, arguments.work)
    end = time.monotonic() + arguments.seconds
    kinds = [(256, 100), (32, 100), (32, 50), (32, 25)]
    for (prompt, share), batch, linears in product(kinds, (1, 2, 4, 8, 16, 32, 64), (False, True)):
        cell = Cell(FIT_MODEL, share, batch, prompt)
        settings = {**DEFAULTS, "linears": linears}
        known = read(arguments.results)
        if any((one["cell"], one["settings"]) == (cell.name, settings) for one in known):
            continue
        if time.monotonic() > end:
            return
        found = run_once(folder, cell, arguments.work, settings, overheads=NO_OVERHEADS)
        append(arguments.results, found)
    rows, rests = [], []
    for one in read(arguments.results):
        features = one["features"]
        seconds = one["batch"] / one["measured"]
        rest = seconds - one["batch"] / one["predicted"]
        uses_kernel = one["settings"]["linears"] and one["batch"] <= MOST_KERNEL_ROWS
        layers = features["layers"]
        row = [
            0 if uses_kernel else layers,
            layers if uses_kernel else 0,
            features["missed"],
            layers * one["batch"],
            features["attention_flops"],
        ]
        # In shares of the step: each run counts alike.
        rows.append([value / seconds for value in row])
        rests.append(rest / seconds)
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
    names = [field.name for field in fields(Overheads)]
    for name, cost in zip(names, costs, strict=True):
        print(f"{name}={cost:.3e}")
    left = np.abs(matrix @ costs - rest)
    print(f"{len(rests)} runs, median error {np.median(left):.1%}, worst {left.max():.1%}")


def show_table(arguments: argparse.Namespace) -> None:
    groups = defaultdict(list)
    for one in read(arguments.results):
        if one["settings"] == DEFAULTS and "is_pair" not in one:
            groups[one["cell"]].append(one)
    print("| cell | runs, processes | tokens/s, measured | spread | predicted | error |")
    print("|---|---|---|---|---|---|")
    errors = []
    for name, runs in groups.items():
        rates = sorted(one["measured"] for one in runs)
        middle = statistics.median(rates)
        expected = statistics.median(one["predicted"] for one in runs)
        errors.append(abs(expected / middle - 1))
        print(
            f"| {name} | {len(runs)}, {len({one['process'] for one in runs})} | {middle:.4g} | "
            f"{rates[0]:.4g} to {rates[-1]:.4g} | {expected:.4g} | {expected / middle - 1:+.1%} |"
        )
    if errors:
        print(f"\n{len(errors)} cells: median error {statistics.median(errors):.1%}, "
              f"worst {max(errors):.1%}")  # fmt: skip
    show_regret(arguments.results)


def show_regret(results: Path) -> None:
    pairs = defaultdict(list)
    for one in read(results):
        if one.get("is_pair"):
            pairs[one["cell"]].append(one)
    for name, runs in pairs.items():
        medians = defaultdict(list)
        for one in runs:
            medians[json.dumps(one["settings"])].append(one["measured"])
        rates = {key: statistics.median(values) for key, values in medians.items()}
        chosen = rates.get(json.dumps(runs[0]["chosen"]), 0.0)
        print(
            f"\n{name}: chosen {chosen:.4g}, best {max(rates.values()):.4g}, defaults "
            f"{rates.get(json.dumps(DEFAULTS), 0.0):.4g} tokens/s, regret "
            f"{max(rates.values()) / chosen - 1:.1%} over {min(map(len, medians.values()))} rounds"
        )


def read(results: Path) -> list[dict[str, Any]]:
    """All lines that are whole: the last one may have been cut short."""
    if not results.is_file():
        return []
    found = []
    for line in results.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def append(results: Path, found: dict[str, Any]) -> None:
    with results.open("a") as file:
        file.write(json.dumps(found) + "\n")
    print(f"{found['cell']}: {found['measured']:.4g} measured, {found['predicted']:.4g} predicted")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["cells", "regret", "table", "fit"])
    parser.add_argument("results", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--residency", type=int)
    parser.add_argument("--runs", type=int, default=4, help="of a cell, in this process")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--work", type=Path, default=Path("bench_model"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    arguments.work.mkdir(exist_ok=True)
    run = {"fit": fit, "cells": measure_cells, "regret": measure_regret, "table": show_table}
    with quiet_transformers(lambda done, total: None):
        run[arguments.what](arguments)


if __name__ == "__main__":
    main()
