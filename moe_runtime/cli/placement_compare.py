"""`moe-runtime placement compare`: our placement beside the usual ones, on held-out tokens."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from moe_runtime.cli.options import Json
from moe_runtime.cli.placement_data import (
    give_blas_one_thread,
    load_traces,
    read_topology,
    split_traces,
)
from moe_runtime.cli.placement_options import (
    Balance,
    Gpus,
    HoldOut,
    Nodes,
    NumExperts,
    ObjectiveName,
    ObjectiveOption,
    Replicas,
    Seed,
    TimeLimit,
    TopologyFile,
    Traces,
    Weights,
    parse_weights,
)
from moe_runtime.cli.placement_view import evaluation_as_dict, warn_of_few_tokens
from moe_runtime.cli.terminal import Terminal

if TYPE_CHECKING:
    from moe_runtime.placement.evaluate import Evaluation
    from moe_runtime.placement.problem import Problem
    from moe_runtime.placement.result import PlacementResult
    from moe_runtime.placement_map import Placement

EPILOG = """Examples:

moe-runtime placement compare T.npz --gpus 8

moe-runtime placement compare T.npz --gpus 16 --nodes 2 --balance 1.05 --json

linear and round-robin are vLLM's layouts, without replicas; EPLB, as DeepSeek published it, looks
at load alone, ExFlow's objective at crossings alone; ours keeps the limit of --balance on the
tokens that it was solved for.
"""

_COLUMNS = (
    ("crossing_fraction", "cross", "{:.4f}"),
    ("inter_node_fraction", "nodes", "{:.4f}"),
    ("fanout", "fan-out", "{:.3f}"),
    ("load_max_over_mean", "load", "{:.3f}"),
    ("load_max_over_mean_256", "of 256", "{:.3f}"),
)
_LEGEND = (
    "cross: transitions of first experts between GPUs; nodes: between nodes; fan-out: GPUs a token "
    "and layer; load: busiest GPU over mean, of all tokens and of 256 at a time; gap: what another "
    "placement could gain at most on the tokens solved for"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Contestant:
    """A placement, and what was found in solving it where that took solving."""

    name: str
    placement: "Placement"
    result: "PlacementResult | None" = None


def compare(
    traces: Traces,
    gpus: Gpus,
    nodes: Nodes = 1,
    topology: TopologyFile = None,
    replicas: Replicas = 0,
    balance: Balance = 1.1,
    weight: Weights = [],  # noqa: B006 - typer copies it
    objective: ObjectiveOption = ObjectiveName.TRANSITIONS,
    time_limit: TimeLimit = 60.0,
    seed: Seed = 0,
    hold_out: HoldOut = 0.2,
    num_experts: NumExperts = None,
    as_json: Json = False,
) -> None:
    """Judge linear, round-robin, random, EPLB, ExFlow's objective and ours on the same tokens.

    All are solved on the sequences that are not held out, where they need any, and judged on those
    that are.
    """
    weights = parse_weights(weight)
    terminal = Terminal(as_json=as_json)
    give_blas_one_thread()
    with terminal.waiting("counting the traces"):
        from moe_runtime.placement.evaluate import evaluate
        from moe_runtime.placement.objective import Objective
        from moe_runtime.placement.problem import Problem
        from moe_runtime.placement.routing_counts import RoutingCounts

        costs = read_topology(topology, gpus=gpus, nodes=nodes)
        split = split_traces(terminal, load_traces(traces, num_experts), hold_out)
        counts = RoutingCounts.of(split.learn, domain_weights=weights)
        problem = Problem(
            counts=counts,
            topology=costs,
            num_slots=counts.num_experts + replicas,
            objective=Objective.named(objective),
            balance=balance,
        )
    warnings = warn_of_few_tokens(terminal, counts)
    contestants = _contestants(terminal, problem, time_limit, seed)
    with terminal.waiting("judging"):
        judges = split.held_out or split.learn
        scores = [evaluate(found.placement, judges, costs) for found in contestants]
    if as_json:
        terminal.show_json(
            {
                "model": counts.model,
                "gpus": gpus,
                "nodes": nodes,
                "num_slots": problem.num_slots,
                "objective": str(objective),
                "balance": balance,
                "seed": seed,
                "hold_out": hold_out,
                "judged_on": "held out" if split.held_out else "the tokens solved on",
                "results": [
                    _as_dict(found, score) for found, score in zip(contestants, scores, strict=True)
                ],
                "warnings": warnings,
            }
        )
        return
    tokens = sum(trace.num_tokens for trace in judges)
    where = "held-out tokens" if split.held_out else "the tokens solved on"
    terminal.show(_table(contestants, scores, f"{counts.model}, {tokens:,} {where}"))
    terminal.remark(_LEGEND)


def _contestants(
    terminal: Terminal, problem: "Problem", time_limit: float, seed: int
) -> list[_Contestant]:
    from moe_runtime.placement import baselines
    from moe_runtime.placement.objective import Objective
    from moe_runtime.placement.solve import solve

    shape = (problem.counts, problem.gpus, problem.topology.nodes)
    found = []
    if problem.counts.num_experts % problem.gpus == 0:  # without replicas they need that
        found = [
            _Contestant(name="linear", placement=baselines.linear(*shape)),
            _Contestant(name="round-robin", placement=baselines.round_robin(*shape)),
            _Contestant(name="random", placement=baselines.random(*shape, seed=seed)),
        ]
    balanced = baselines.eplb(*shape, num_slots=problem.num_slots)
    found.append(_Contestant(name="EPLB", placement=balanced))
    crossings_alone = replace(problem, objective=Objective(transitions=1.0), balance=None)
    for name, asked in (("ExFlow's objective", crossings_alone), ("ours", problem)):
        with terminal.progress(f"solving: {name}") as meter:
            result = solve(
                asked,
                time_limit_seconds=time_limit,
                seed=seed,
                on_progress=meter.update,
            )
        found.append(_Contestant(name=name, placement=result.placement, result=result))
    return found


def _as_dict(found: _Contestant, score: "Evaluation") -> dict[str, Any]:
    facts: dict[str, Any] = {"name": found.name}
    if found.result is not None:
        facts |= {
            "solver": found.result.solver,
            "status": str(found.result.status),
            "stopped_by": str(found.result.stopped_by),
            "seconds": found.result.seconds,
            "gap": found.result.gap,
        }
    return facts | evaluation_as_dict(score)


def _table(contestants: list[_Contestant], scores: "list[Evaluation]", title: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("placement", no_wrap=True)
    for _, label, _ in _COLUMNS:
        table.add_column(label, justify="right")
    table.add_column("gap", justify="right")
    table.add_column("s", justify="right")
    for found, score in zip(contestants, scores, strict=True):
        values = [form.format(getattr(score, name)) for name, _, form in _COLUMNS]
        solved = ["", ""]
        if found.result is not None:
            solved = [f"{found.result.gap:.4f}", f"{found.result.seconds:.1f}"]
        table.add_row(found.name, *values, *solved)
    return table
