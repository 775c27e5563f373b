"""`moe-runtime trace info`: load, reuse and dependence of the layers of a trace."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from moe_runtime.cli.options import Json
from moe_runtime.cli.terminal import Terminal

if TYPE_CHECKING:
    from moe_runtime.simulate.trace_statistics import LayerStatistics, TraceStatistics

EPILOG = """Examples:

moe-runtime trace info routing.npz

moe-runtime trace info routing.npz --num-experts 128 --json
"""

_COLUMNS = (
    "layer",
    "used",
    "busiest",
    "entropy",
    "reuse, steps",
    "reuse, experts",
    "next, bits",
    "permuted",
)
_LEGEND = (
    "used: experts with a token; busiest: its load over the mean; entropy: 1 is balanced; reuse: "
    "median distance to the use before; next: mutual information of first experts with the next "
    "layer's; permuted: the same with no dependence left"
)


def info(
    trace: Annotated[Path, typer.Argument(metavar="T.npz", help="A routing trace.")],
    num_experts: Annotated[
        int | None,
        typer.Option(min=1, help="Experts a layer, for a file that does not say it, or wrongly."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a trace holds and, layer by layer, load, reuse and what it tells of the next."""
    terminal = Terminal(as_json=as_json)
    with terminal.waiting("counting"):
        from moe_runtime.simulate.trace_statistics import trace_statistics
        from moe_runtime.trace import Trace

        loaded = Trace.load(trace, num_experts=num_experts, leave_out=("gate_probs", "hidden"))
        found = trace_statistics(loaded)
    if as_json:
        terminal.show_json(found.as_dict())
        return
    summary = Table(show_header=False)
    for name, value in _summary(found):
        summary.add_row(name, value)
    terminal.show(summary)
    layers = Table(*_COLUMNS, caption=_LEGEND, caption_justify="left")
    for layer in found.layers:
        layers.add_row(*_cells(layer))
    terminal.show(layers)


def _summary(found: "TraceStatistics") -> Iterator[tuple[str, str]]:
    phases = ", ".join(f"{count} {name}" for name, count in found.phases.items() if count)
    yield "model", found.model
    yield "tokens", f"{found.num_tokens} ({phases})"
    yield "sequences", str(found.num_sequences)
    yield "steps", str(found.num_steps)
    yield "layers", f"{found.num_hidden_layers}, {found.num_layers} of them with experts"
    yield "experts", f"{found.num_experts} a layer, {found.top_k} a token"
    if found.num_missing:
        yield "missing", f"{found.num_missing} expert ids"
    if found.domains:
        counts = [f"{name} {count}" for name, count in sorted(found.domains.items())]
        yield "domains", ", ".join(counts)


def _cells(layer: "LayerStatistics") -> Iterator[str]:
    yield str(layer.layer_id)
    yield str(layer.num_used_experts)
    yield f"{layer.max_load:.2f}"
    yield f"{layer.load_entropy:.3f}"
    yield _number(layer.median_reuse_steps, ".0f")
    yield _number(layer.median_reuse_experts, ".0f")
    yield _number(layer.next_layer_bits, ".3f")
    yield _number(layer.permuted_bits, ".3f")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
