"""`moe-runtime placement evaluate`: what a placement would cost the tokens of a trace."""

from rich.table import Table

from moe_runtime.cli.options import Json
from moe_runtime.cli.outputs import check_writable
from moe_runtime.cli.placement_data import load_traces, read_topology
from moe_runtime.cli.placement_options import (
    NumExperts,
    PlacementFile,
    Plot,
    TopologyFile,
    Traces,
)
from moe_runtime.cli.placement_view import (
    evaluation_as_dict,
    figures_table,
    show_domains,
    warn_of_load,
)
from moe_runtime.cli.terminal import Terminal

EPILOG = """Examples:

moe-runtime placement evaluate placement.json OTHER.npz

moe-runtime placement evaluate placement.json T.npz --json

Placements of other programs come in through `moe-runtime placement import`.
"""


def evaluate(
    placement: PlacementFile,
    traces: Traces,
    topology: TopologyFile = None,
    num_experts: NumExperts = None,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Follow the tokens of traces through any placement: crossings, fan-out, load, by domain."""
    if plot is not None:
        check_writable(plot)
    terminal = Terminal(as_json=as_json)
    with terminal.waiting("following the tokens"):
        from moe_runtime.placement.evaluate import evaluate as evaluate_placement
        from moe_runtime.placement_map import Placement
        from moe_runtime.report.placement_plots import plot_placement
        from moe_runtime.report.plots import check_plot_name

        if plot is not None:
            check_plot_name(plot)
        found = Placement.load(placement)
        costs = read_topology(topology, gpus=found.gpus, nodes=found.nodes)
        loaded = load_traces(traces, num_experts)
        evaluation = evaluate_placement(found, loaded, costs)
        if plot is not None:
            plot_placement(found, loaded, plot, topology=costs)
    limit = found.made.get("balance")
    warnings: list[str] = []
    if isinstance(limit, int | float):
        warnings = warn_of_load(terminal, evaluation, float(limit), "these tokens")
    if as_json:
        solved = {
            name: found.made.get(name)
            for name in ("status", "stopped_by", "solver", "seconds", "lower_bound", "gap")
        }
        terminal.show_json(
            {
                "placement": str(placement),
                "model": found.model,
                "gpus": found.gpus,
                "nodes": found.nodes,
                "num_slots": found.num_slots,
                **solved,
                **evaluation_as_dict(evaluation),
                "warnings": warnings,
            }
        )
        return
    terminal.show(
        figures_table({placement.name: evaluation}, "crossings of the first expert's path")
    )
    show_domains(terminal, evaluation, "by domain")
    layers = Table(title="by layer", title_justify="left")
    for name in ("layer", "crossings", "GPUs a token", "busiest over mean"):
        layers.add_column(name, justify="right")
    for layer in evaluation.per_layer:
        layers.add_row(
            f"{layer.layer_id}",
            f"{layer.crossing_fraction:.4f}",
            f"{layer.fanout:.3f}",
            f"{layer.load_max_over_mean:.3f}",
        )
    terminal.show(layers)
