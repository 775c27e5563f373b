"""`moe-runtime cache simulate`: what a cache of experts would have hit."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from moe_runtime.cli.options import OUTPUT_PANEL, Json
from moe_runtime.cli.outputs import check_writable
from moe_runtime.cli.terminal import Terminal

if TYPE_CHECKING:
    from moe_runtime.simulate.accesses import Accesses
    from moe_runtime.simulate.replay import SimulationResult
    from moe_runtime.trace import Trace

EPILOG = """Examples:

moe-runtime cache simulate T.npz --slots 96,192 --policies lru,belady

moe-runtime cache simulate T.npz --policy-trace EARLIER.npz --plot hit_rate.png

moe-runtime cache simulate T.npz --slots 96 --policies lru --steps STEPS.npz --json
"""

_ALL = "all"
_DEFAULT_EIGHTHS = range(1, 8)  # of all experts, when no slots are given
_POLICY_FIELDS = ("topk", "step")  # all that a replay looks at


def simulate(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="A routing trace, .npz.")],
    slots: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Slots of the cache, over all layers; eighths of all experts by default.",
        ),
    ] = None,
    policies: Annotated[
        str,
        typer.Option(metavar="NAME,...", help="Of lru, lfu, static and belady, or all."),
    ] = _ALL,
    policy_trace: Annotated[
        Path | None,
        typer.Option(
            metavar="TRACE", help="Where static counts its favourites; the trace itself by default."
        ),
    ] = None,
    num_experts: Annotated[
        int | None,
        typer.Option(min=1, help="Experts a layer, where a trace does not say it rightly."),
    ] = None,
    steps: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.npz",
            help="Write step, layer, expert and hit of every access.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png",
            help="Draw hit rate over slots (.png, .svg or .pdf).",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Replay a routing trace through the runtime's cache and eviction policies.

    Hits and misses are those of a real run with this routing, as the same code decides. Belady
    knows the future: no policy that reads experts only when they are needed has more hits.
    """
    terminal = Terminal(as_json=as_json)
    with terminal.waiting("reading the trace"):
        from moe_runtime.report.plots import check_plot_name, plot_hit_rates
        from moe_runtime.simulate.accesses import Accesses
        from moe_runtime.simulate.replay import POLICIES, check_policies, check_slots, replay_all
        from moe_runtime.simulate.steps_file import write_steps
        from moe_runtime.trace import Trace
        from moe_runtime.trace_fields import FIELDS

        names = list(POLICIES) if policies == _ALL else _split(policies)
        check_policies(names)
        sizes = None if slots is None else _whole_numbers(slots)
        check_slots(sizes or [])
        if plot is not None:
            check_plot_name(plot)
        for output in (steps, plot):
            if output is not None:
                check_writable(output)
        unused = set(FIELDS) - set(_POLICY_FIELDS)
        found = Trace.load(trace, num_experts=num_experts, leave_out=unused)
        accesses = Accesses.of(found)
        policy_accesses = None
        if policy_trace is not None:
            other = Trace.load(policy_trace, num_experts=num_experts, leave_out=unused)
            policy_accesses = Accesses.of(other)
    if sizes is None:
        sizes = sorted({max(1, accesses.num_keys * n // 8) for n in _DEFAULT_EIGHTHS})
    _warn_of_small(terminal, min(sizes), found, names)
    with terminal.progress("replaying") as meter:
        results = replay_all(
            accesses,
            slots=sizes,
            policies=names,
            policy_accesses=policy_accesses,
            keep_hits=steps is not None,
            on_progress=meter.update,
        )
    if steps is not None:
        write_steps(steps, accesses, results)
    if plot is not None:
        plot_hit_rates(
            results,
            plot,
            title=f"{_name(found, trace)}, {found.num_tokens:,} tokens",
            num_experts=accesses.num_keys,
            floor=found.num_layers * found.top_k,
        )
    if "static" in names and policy_accesses is None:
        terminal.remark(
            "static was given the most used experts of this very trace, so it has seen the future; "
            "--policy-trace takes them from another"
        )
    if as_json:
        terminal.show_json(_as_dict(found, accesses, results))
    else:
        terminal.show(_table(accesses, results, _name(found, trace)))


def _split(text: str) -> list[str]:
    """The words between the commas, each once."""
    return list(dict.fromkeys(word.strip() for word in text.split(",")))


def _whole_numbers(text: str) -> list[int]:
    try:
        return list(dict.fromkeys(int(word) for word in _split(text)))
    except ValueError:
        raise typer.BadParameter(
            f"--slots {text!r} is not a list of whole numbers; write --slots 96,192"
        ) from None


def _warn_of_small(terminal: Terminal, size: int, trace: "Trace", policies: list[str]) -> None:
    others = (trace.num_layers - 1) * trace.top_k
    if size < trace.top_k:
        terminal.warn(
            f"{size} {'slot is' if size == 1 else 'slots are'} fewer than the {trace.top_k} "
            "experts that one token uses in one layer: a layer runs in waves, and next to nothing "
            "can be hit"
        )
    elif "lru" in policies and size <= others:
        terminal.warn(
            f"{size} slots are no more than the {others} experts that a token uses between two "
            "visits of a layer, so lru hits next to nothing"
        )


def _name(trace: "Trace", path: Path) -> str:
    return path.name if trace.model == "unknown" else f"{trace.model} ({path.name})"


def _as_dict(
    trace: "Trace", accesses: "Accesses", results: "list[SimulationResult]"
) -> dict[str, Any]:
    return {
        "model": trace.model,
        "num_tokens": trace.num_tokens,
        "num_steps": trace.num_steps,
        "num_layers": trace.num_layers,
        "num_experts": trace.num_experts,
        "top_k": trace.top_k,
        "num_accesses": len(accesses),
        "results": [
            {
                "policy": result.policy,
                "slots": result.slots,
                "hits": result.hits,
                "misses": result.misses,
                "hit_rate": result.hit_rate,
                "bytes_fetched_experts": result.bytes_fetched_experts,
                "seconds": result.seconds,
                "sees_future": result.sees_future,
                "per_layer": [
                    {"layer": layer, "hits": hits, "misses": misses}
                    for layer, (hits, misses) in enumerate(
                        zip(result.layer_hits, result.layer_misses, strict=True)
                    )
                ],
            }
            for result in results
        ],
    }


def _table(accesses: "Accesses", results: "list[SimulationResult]", title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("policy")
    for name in ("slots", "of experts", "hit rate", "hits", "misses", "seconds"):
        table.add_column(name, justify="right")
    for result in results:
        table.add_row(
            result.policy,
            f"{result.slots}",
            f"{result.slots / accesses.num_keys:.1%}",
            f"{result.hit_rate:.4f}",
            f"{result.hits}",
            f"{result.misses}",
            f"{result.seconds:.1f}",
        )
    return table
