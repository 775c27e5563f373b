"""Measures how much slower the chosen plan is than the best of a grid of settings, cell by cell.

    python scripts/bench_regret.py run RESULTS.jsonl --model mixtral-stdlib --residency 50
    python scripts/bench_regret.py table RESULTS.jsonl

Every combination of docs/benchmarks/plan_cells.yaml runs once; then the best three, the chosen plan
and the defaults run again in turns, all of them loaded at once. A result is one line, and what a
file holds already is not measured again. `--seconds` ends it after the run that is under way.
"""

import argparse
import json
import statistics
import time
import warnings
from collections import defaultdict
from contextlib import ExitStack, closing
from dataclasses import asdict
from itertools import groupby, product
from pathlib import Path
from typing import Any

from plan_cells import (
    DEFAULTS,
    MOST_OTHERS_CORES,
    PLAN,
    TIMED_SEED,
    Cell,
    Timing,
    append,
    cells,
    curves_of,
    folder_of,
    load,
    read,
    time_text,
)

import moe_runtime
from moe_runtime.integrations.transformers.progress import quiet_transformers
from moe_runtime.integrations.transformers.spec_reader import spec_of_folder
from moe_runtime.measure.probe.other_load import OtherLoad
from moe_runtime.measure.this_machine import this_machine
from moe_runtime.perf.plan import PlanRequest
from moe_runtime.perf.planner import make_plan

# Threads last, as they need no other model.
NAMES = sorted(PLAN["grid"], key=lambda name: name == "threads")
GRID = [
    dict(zip(NAMES, values, strict=True))
    for values in product(*(PLAN["grid"][name] for name in NAMES))
]
MOST_TRIES = 3  # of a round beside which others run; the last one counts
LEAST_SPREAD = 1.1  # of best over worst: below it a cell does not count
Settings = dict[str, Any]


def key(settings: Settings) -> str:
    return json.dumps(settings, sort_keys=True)


def without_threads(settings: Settings) -> str:
    return key({name: value for name, value in settings.items() if name != "threads"})


def chosen_settings(folder: Path, cell: Cell, work: Path) -> Settings:
    """What a plan takes, of the settings in the grid, before anything is tried.

    Hit rates are simulated on the routing of other texts, as `plan --trace` has them.
    """
    spec = spec_of_folder(folder)
    plan = make_plan(
        PlanRequest(
            spec=spec,
            hardware=this_machine(folder, read_bytes=spec.expert_bytes),
            batch=cell.batch,
            curves=curves_of(folder, cell, work),
            prompt_tokens=cell.prompt_tokens,
            new_tokens=PLAN["new_tokens"],
            expert_memory_bytes=cell.residency * spec.expert_total_bytes // 100,
        )
    )
    return {name: getattr(plan.chosen.settings, name) for name in NAMES}


def sweep(cell: Cell, folder: Path, results: Path, end: float) -> bool:
    """Each setting once; whether all are done."""
    known = {key(one["settings"]) for one in runs_of(results, cell, "sweep")}
    left = [settings for settings in GRID if key(settings) not in known]
    for _, group in groupby(left, key=without_threads):
        if time.monotonic() > end:
            return False
        alike = list(group)
        model = load(folder, cell, alike[0])
        with closing(moe_runtime.handle(model)):
            for settings in alike:
                timing = time_text(model, folder, cell, settings["threads"], TIMED_SEED)
                append(results, line(cell, "sweep", settings, timing))
    return True


def compare(
    cell: Cell, folder: Path, results: Path, work: Path, end: float, num_rounds: int
) -> None:
    """The best three of the sweep, the chosen plan and the defaults, in turns."""
    swept = {key(one["settings"]): one for one in runs_of(results, cell, "sweep")}
    ranked = sorted(swept.values(), key=lambda one: -one["tokens_per_second"])
    done = runs_of(results, cell, "round")
    if done:
        chosen = done[0]["chosen"]
        rivals = list({key(one["settings"]): one["settings"] for one in done}.values())
    else:
        chosen = chosen_settings(folder, cell, work)
        best = [one["settings"] for one in ranked[:3]]
        rivals = list({key(one): one for one in [*best, chosen, DEFAULTS]}.values())
    first = len(done) // len(rivals)
    with ExitStack() as stack:
        models = {}
        for settings in rivals:
            model = load(folder, cell, settings)
            stack.enter_context(closing(moe_runtime.handle(model)))
            models[key(settings)] = model
            # Reads ahead and evictions by prediction need a text to find their feet.
            time_text(model, folder, cell, settings["threads"], TIMED_SEED)
        for number in range(first, num_rounds):
            for _ in range(MOST_TRIES):
                if time.monotonic() > end:
                    return
                others = OtherLoad()
                found = []
                # Each goes first in turn: what a run leaves in caches is the next one's.
                turn = number % len(rivals)
                for settings in [*rivals[turn:], *rivals[:turn]]:
                    model, seed = models[key(settings)], TIMED_SEED + number
                    timing = time_text(model, folder, cell, settings["threads"], seed)
                    found.append(line(cell, "round", settings, timing) | {"chosen": chosen})
                if others.cores() <= MOST_OTHERS_CORES:
                    break
            for one in found:  # a round counts when it is whole
                append(results, one)


def line(cell: Cell, kind: str, settings: Settings, timing: Timing) -> dict[str, Any]:
    return {"cell": cell.name, "kind": kind, "settings": settings} | asdict(timing)


def runs_of(results: Path, cell: Cell, kind: str) -> list[dict[str, Any]]:
    return [one for one in read(results) if one["cell"] == cell.name and one["kind"] == kind]


def run(arguments: argparse.Namespace) -> None:
    end = time.monotonic() + arguments.seconds
    for cell in cells(arguments.model, arguments.residency, arguments.batch):
        folder = folder_of(cell.model, arguments.work)
        rounds = runs_of(arguments.results, cell, "round")
        rivals = {key(one["settings"]) for one in rounds}
        if rounds and len(rounds) >= arguments.rounds * len(rivals):
            continue
        if not sweep(cell, folder, arguments.results, end) or time.monotonic() > end:
            return
        compare(cell, folder, arguments.results, arguments.work, end, arguments.rounds)
        print(f"{cell.name} {'left unfinished' if time.monotonic() > end else 'done'}")


def show_table(arguments: argparse.Namespace) -> None:
    groups = defaultdict(list)
    for one in read(arguments.results):
        groups[one["cell"]].append(one)
    print(
        "| cell | worst, swept | defaults | chosen | best | regret | in pairs | rounds "
        "| chosen plan | best |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    regrets = []
    for name, runs in groups.items():
        medians = defaultdict(list)
        for one in runs:
            if one["kind"] == "round":
                medians[key(one["settings"])].append(one["tokens_per_second"])
        swept = [one["tokens_per_second"] for one in runs if one["kind"] == "sweep"]
        if not medians:
            print(f"| {name} | {len(swept)} of {len(GRID)} swept |")
            continue
        chosen = next(one["chosen"] for one in runs if one["kind"] == "round")
        rates = {settings: statistics.median(values) for settings, values in medians.items()}
        best = max(rates, key=lambda settings: rates[settings])
        regret = rates[best] / rates[key(chosen)] - 1
        # The host's pace changes between rounds, less within one.
        own = medians[key(chosen)]
        paired = max(
            statistics.median(one / other for one, other in zip(rival, own, strict=True))
            for rival in medians.values()
        )
        counts = rates[best] / min(swept) >= LEAST_SPREAD
        if counts:
            regrets.append(regret)
        print(
            f"| {name} | {min(swept):.4g} | {rates[key(DEFAULTS)]:.4g} | {rates[key(chosen)]:.4g} "
            f"| {rates[best]:.4g} | {regret:.1%}{'' if counts else ', not counted'} | "
            f"{paired - 1:.1%} | {len(own)} | {short(chosen)} | {short(json.loads(best))} |"
        )
    if regrets:
        within = sum(regret <= 0.05 for regret in regrets) / len(regrets)
        print(f"\n{len(regrets)} cells: {within:.0%} within 5 %, worst {max(regrets):.1%}")


def short(settings: Settings) -> str:
    """What departs from the defaults."""
    found = [f"{name} {value}" for name, value in settings.items() if value != DEFAULTS[name]]
    return ", ".join(found) or "defaults"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("results", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--residency", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--work", type=Path, default=Path("bench_model"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    arguments.work.mkdir(exist_ok=True)
    with quiet_transformers(lambda done, total: None):
        {"run": run, "table": show_table}[arguments.what](arguments)


if __name__ == "__main__":
    main()
