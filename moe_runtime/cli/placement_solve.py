"""`moe-runtime placement solve`: which GPU should hold which expert."""

from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from moe_runtime import __version__
from moe_runtime.cli.options import OUTPUT_PANEL, Json
from moe_runtime.cli.outputs import check_writable
from moe_runtime.cli.placement_data import (
    give_blas_one_thread,
    load_traces,
    read_topology,
    split_traces,
)
from moe_runtime.cli.placement_options import (
    CLUSTER_PANEL,
    GOAL_PANEL,
    SEARCH_PANEL,
    Balance,
    Gpus,
    HoldOut,
    Nodes,
    NumExperts,
    ObjectiveName,
    ObjectiveOption,
    PlacementOutput,
    Plot,
    Replicas,
    Seed,
    TimeLimit,
    TopologyFile,
    Traces,
    Weights,
    parse_weights,
)
from moe_runtime.cli.placement_view import (
    evaluation_as_dict,
    figures_table,
    show_domains,
    warn_of_few_tokens,
    warn_of_load,
)
from moe_runtime.cli.terminal import Terminal

if TYPE_CHECKING:
    from moe_runtime.placement.evaluate import Evaluation
    from moe_runtime.placement.result import PlacementResult
    from moe_runtime.placement_map import Placement
    from moe_runtime.trace import Trace

EPILOG = """Examples:

moe-runtime placement solve T.npz --gpus 8 --balance 1.1 -o placement.json

moe-runtime placement solve chat.npz code.npz --gpus 16 --nodes 2 --weight coding=2 -o P.json

moe-runtime placement solve T.npz --gpus 8 --replicas 32 --from OLD.json --move-cost 0.01 -o P.json

docs/placement.md has the mathematics, and how engines load the result.
"""

_INTERRUPTED = 130  # 128 + SIGINT, as shells count


def solve(
    traces: Traces,
    gpus: Gpus,
    output: PlacementOutput,
    nodes: Nodes = 1,
    topology: TopologyFile = None,
    replicas: Replicas = 0,
    balance: Balance = None,
    weight: Weights = [],  # noqa: B006 - typer copies it
    previous: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="OLD.json",
            help="The placement that is there now; moving away from it has a price.",
            rich_help_panel=CLUSTER_PANEL,
        ),
    ] = None,
    move_cost: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="Price of an expert that moves, in hops a token; see docs/placement.md.",
            rich_help_panel=GOAL_PANEL,
        ),
    ] = 0.0,
    objective: ObjectiveOption = ObjectiveName.TRANSITIONS,
    solver: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="auto, dp, hungarian, search, ilp, eplb; ilp:NAME takes another solver of PuLP.",
            rich_help_panel=SEARCH_PANEL,
        ),
    ] = "auto",
    time_limit: TimeLimit = 60.0,
    seed: Seed = 0,
    hold_out: HoldOut = 0.2,
    num_experts: NumExperts = None,
    tables: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.npz",
            help="Write where each token id, and each pair of GPUs, leads: speculative shuffling.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = None,
    theta: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            help="How much groups of token ids in --tables look at load; 0 is not at all.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = 0.0,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Place experts on GPUs, so that tokens cross less and no GPU is overloaded.

    A share of the traces' sequences is held out: the placement is solved on the others and judged
    on both. Ctrl-C ends the search and keeps the best placement so far.
    """
    weights = parse_weights(weight)
    for file in (output, tables, plot):
        if file is not None:
            check_writable(file)
    terminal = Terminal(as_json=as_json)
    give_blas_one_thread()
    with terminal.waiting("counting the traces"):
        from moe_runtime.placement.evaluate import evaluate
        from moe_runtime.placement.objective import Objective
        from moe_runtime.placement.problem import Problem
        from moe_runtime.placement.routing_counts import RoutingCounts
        from moe_runtime.placement.solve import solve as solve_problem
        from moe_runtime.placement_map import Placement
        from moe_runtime.predictors.token_expert_counts import token_expert_counts
        from moe_runtime.report.placement_plots import plot_placement
        from moe_runtime.report.plots import check_plot_name

        if plot is not None:
            check_plot_name(plot)
        costs = read_topology(topology, gpus=gpus, nodes=nodes)
        old = None if previous is None else Placement.load(previous)
        split = split_traces(terminal, load_traces(traces, num_experts), hold_out)
        counts = RoutingCounts.of(split.learn, domain_weights=weights)
        by_token = None
        if objective is ObjectiveName.COCLUSTER or tables is not None:
            by_token = token_expert_counts(split.learn)
        if tables is not None and (by_token is None or replicas):
            raise ValueError(
                f"--tables {tables} needs token ids in the traces, and no replicas; "
                "record with `moe-runtime trace record`, or leave the tables out"
            )
        problem = Problem(
            counts=counts,
            topology=costs,
            num_slots=counts.num_experts + replicas,
            objective=Objective.named(objective),
            balance=balance,
            previous=old,
            move_cost=move_cost,
            token_expert=by_token,
        )
    warnings = warn_of_few_tokens(terminal, counts)
    with terminal.progress("solving") as meter:
        result = solve_problem(
            problem,
            solver=solver,
            time_limit_seconds=time_limit,
            seed=seed,
            on_progress=meter.update,
        )
    options = {
        "objective": str(objective), "balance": balance, "seed": seed, "hold_out": hold_out,
        "domain_weights": weights, "move_cost": move_cost,
    }  # fmt: skip
    placement = replace(
        result.placement,
        made={
            "program": f"moe-runtime {__version__}",
            "traces": [file.name for file in traces],
            **options,
            **_as_dict(result),
        },
    )
    placement.save(output)
    if tables is not None:
        _write_tables(tables, placement, by_token, split.learn, theta)
    with terminal.waiting("judging"):
        learned = evaluate(placement, split.learn, costs)
        judged = evaluate(placement, split.held_out, costs) if split.held_out else None
        placement = replace(
            placement, made={**placement.made, "judged": _judged(judged, learned, counts.top_k)}
        )
        placement.save(output)
        if plot is not None:
            plot_placement(placement, split.held_out or split.learn, plot, topology=costs)
    if balance is not None and judged is not None:
        warnings += warn_of_load(terminal, judged, balance, "held-out sequences")
    if as_json:
        held_out = None if judged is None else {"share": hold_out, **evaluation_as_dict(judged)}
        terminal.show_json(
            {
                "output": str(output),
                "model": placement.model,
                "num_experts": placement.num_experts,
                "num_layers": placement.num_layers,
                "gpus": gpus,
                "nodes": nodes,
                "num_slots": placement.num_slots,
                **options,
                **_as_dict(result),
                **evaluation_as_dict(learned),
                "held_out": held_out,
                "warnings": warnings,
            }
        )
    else:
        _show(terminal, result, learned, judged, output)
    if result.stopped_by == "interrupted":
        terminal.remark(f"interrupted; the best placement so far is in {output}")
        raise typer.Exit(_INTERRUPTED)


def _write_tables(
    file: Path, placement: "Placement", by_token: Any, traces: "list[Trace]", theta: float
) -> None:
    from moe_runtime.placement.cocluster import device_tables
    from moe_runtime.trace_file import Member, write_npz

    found = device_tables(placement, by_token, traces, theta=theta)
    names = [field.name for field in fields(found)]
    write_npz(file, [Member.of(name, getattr(found, name)) for name in names])


def _judged(held_out: "Evaluation | None", learned: "Evaluation", top_k: int) -> dict[str, Any]:
    """What dispatch `auto` may expect of the placement."""
    found = held_out or learned
    return {
        "on": "held out" if held_out else "solved on",
        "top_k": top_k,
        "fanout": found.fanout,
        "crossing_fraction": found.crossing_fraction,
    }


def _as_dict(result: "PlacementResult") -> dict[str, Any]:
    return {
        "status": str(result.status),
        "stopped_by": str(result.stopped_by),
        "solver": result.solver,
        "seconds": result.seconds,
        "objective_value": result.objective,
        "lower_bound": result.lower_bound,
        "bound": result.bound,
        "gap": result.gap,
    }


def _show(
    terminal: Terminal,
    result: "PlacementResult",
    learned: "Evaluation",
    judged: "Evaluation | None",
    output: Path,
) -> None:
    summary = Table(show_header=False)
    summary.add_row("placement", str(output))
    summary.add_row("solver", f"{result.solver}, {result.seconds:.1f} s")
    summary.add_row("status", f"{result.status}, stopped by {result.stopped_by}")
    summary.add_row("objective", f"{result.objective:.4f}")
    summary.add_row("no placement is below", f"{result.lower_bound:.4f} ({result.bound})")
    summary.add_row("gap", f"{result.gap:.4f}")
    terminal.show(summary)
    columns = {"solved on": learned}
    if judged is not None:
        columns["held out"] = judged
    terminal.show(figures_table(columns, "crossings of the first expert's path, load of all"))
    show_domains(terminal, judged or learned, "by domain, held out" if judged else "by domain")
