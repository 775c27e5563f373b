"""`moe-runtime cache simulate`: what a cache of experts would have hit."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from moe_runtime.cli.options import OUTPUT_PANEL, Json
from moe_runtime.cli.outputs import check_writable
from moe_runtime.cli.terminal import Terminal
from moe_runtime.cli.timeline_view import timeline_table, timelines_as_dicts

if TYPE_CHECKING:
    from moe_runtime.predictors.predictor import Predictor
    from moe_runtime.simulate.accesses import Accesses
    from moe_runtime.simulate.replay import SimulationResult
    from moe_runtime.simulate.timelines import TimelineResult
    from moe_runtime.trace import Trace

EPILOG = """Examples:

moe-runtime cache simulate T.npz --slots 96,192 --policies lru,belady

moe-runtime cache simulate T.npz --policy-trace EARLIER.npz --plot hit_rate.png

moe-runtime cache simulate T.npz --slots 96 --policies lru --steps STEPS.npz --json

moe-runtime cache simulate T.npz --slots 96 --predictor P.safetensors --hardware machine.yaml
"""

_ALL = "all"
_DEFAULT_EIGHTHS = range(1, 8)  # of all experts, when no slots are given
_POLICY_FIELDS = frozenset({"topk", "step"})  # all that a replay looks at
_PREDICTOR_FIELDS = frozenset({"token_id", "sequence_id", "position", "phase"})  # told to each
MACHINE_PANEL = "Time on a machine"
# Of OLMoE-1B-7B in bfloat16: an expert, and a layer's attention.
_EXPERT_BYTES = 3 * 2048 * 1024 * 2
_DENSE_BYTES = 4 * 2048 * 2048 * 2


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
        typer.Option(
            metavar="NAME,...",
            help="Of lru, lfu, static, adapmoe, plec, belady and queue_belady; all: those that "
            "need no more than a trace.",
        ),
    ] = _ALL,
    policy_trace: Annotated[
        Path | None,
        typer.Option(
            metavar="TRACE",
            help="Where static counts favourites and adapmoe misses, the trace itself by default; "
            "and what plec has seen before, nothing by default.",
        ),
    ] = None,
    predictor: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Tell plec what this predictor says, as it would live."),
    ] = None,
    predicted_trace: Annotated[
        Path | None,
        typer.Option(
            metavar="TRACE", help="Paths that queue_belady expects, from predictor trace."
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
    hardware: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.yaml",
            help="Simulate the time too, on the machine that probe wrote this file of.",
            rich_help_panel=MACHINE_PANEL,
        ),
    ] = None,
    expert_bytes: Annotated[
        int,
        typer.Option(min=1, help="Bytes of one expert; OLMoE's.", rich_help_panel=MACHINE_PANEL),
    ] = _EXPERT_BYTES,
    dense_bytes: Annotated[
        int,
        typer.Option(
            min=0,
            help="Bytes of a layer's other weights; OLMoE's.",
            rich_help_panel=MACHINE_PANEL,
        ),
    ] = _DENSE_BYTES,
    as_json: Json = False,
) -> None:
    """Replay a routing trace through the runtime's cache and eviction policies.

    Hits and misses are those of a real run with this routing, as the same code decides. Belady
    knows the future: no policy that reads experts only when they are needed has more hits. With
    --hardware the reads are also played on the lanes of a machine, where plec also fetches ahead.
    """
    terminal = Terminal(as_json=as_json)
    with terminal.waiting("reading the trace"):
        from moe_runtime.predictors.predictor import Fingerprint
        from moe_runtime.report.plots import check_plot_name, plot_hit_rates
        from moe_runtime.simulate.accesses import Accesses
        from moe_runtime.simulate.policy_maker import POLICIES, QUEUE, check_policies, check_slots
        from moe_runtime.simulate.replay import replay_all
        from moe_runtime.simulate.steps_file import write_steps
        from moe_runtime.trace import Trace
        from moe_runtime.trace_fields import FIELDS

        names = list(POLICIES) if policies == _ALL else _split(policies)
        if predicted_trace is not None and policies == _ALL:
            names.append(QUEUE)
        check_policies(names, has_queue=predicted_trace is not None)
        sizes = None if slots is None else _whole_numbers(slots)
        check_slots(sizes or [])
        if plot is not None:
            check_plot_name(plot)
        for output in (steps, plot):
            if output is not None:
                check_writable(output)
        cost = None
        if hardware is not None:
            from moe_runtime.memory.disk import CHUNK_BYTES
            from moe_runtime.perf.hardware import Hardware
            from moe_runtime.perf.step_cost import StepCost

            machine = Hardware.load(hardware)
            cost = StepCost.of(
                machine,
                expert_bytes=expert_bytes,
                dense_bytes=dense_bytes,
                piece_bytes=CHUNK_BYTES,
            )
        wanted = _POLICY_FIELDS
        told_by: Predictor | None = None
        if predictor is not None:
            from moe_runtime.predictors.store import check_fingerprint, load_predictor

            told_by = load_predictor(predictor)
            wanted |= _PREDICTOR_FIELDS | told_by.needs
        unused = set(FIELDS) - wanted
        found = Trace.load(trace, num_experts=num_experts, leave_out=unused)
        if told_by is not None:
            check_fingerprint(told_by, Fingerprint.of(found), str(predictor))
        accesses = Accesses.of(found)
        others = [
            None
            if path is None
            else Accesses.of(
                Trace.load(path, num_experts=num_experts, leave_out=set(FIELDS) - _POLICY_FIELDS)
            )
            for path in (policy_trace, predicted_trace)
        ]
        policy_accesses, queue = others
    if sizes is None:
        sizes = sorted({max(1, accesses.num_keys * n // 8) for n in _DEFAULT_EIGHTHS})
    _warn_of_small(terminal, min(sizes), found, names)
    if told_by is not None and "plec" not in names:
        terminal.warn("only plec listens to a predictor, and it is not among --policies")
    with terminal.progress("replaying") as meter:
        results = replay_all(
            accesses,
            slots=sizes,
            policies=names,
            policy_accesses=policy_accesses,
            queue=queue,
            predictor=told_by,
            trace=found,
            keep_hits=steps is not None,
            on_progress=meter.update,
        )
    timelines: list[TimelineResult] = []
    if cost is not None:
        from moe_runtime.simulate.timelines import play_all

        with terminal.progress("playing on the machine") as meter:
            timelines = play_all(
                accesses,
                found,
                slots=sizes,
                policies=names,
                cost=cost,
                policy_accesses=policy_accesses,
                queue=queue,
                predictor=told_by,
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
        facts = _as_dict(found, accesses, results)
        if cost is not None:
            facts["machine"] = asdict(cost) | {
                "expert_bytes": expert_bytes,
                "dense_bytes": dense_bytes,
                "timelines": timelines_as_dicts(timelines),
            }
        terminal.show_json(facts)
    else:
        terminal.show(_table(accesses, results, _name(found, trace)))
        if cost is not None:
            terminal.show(timeline_table(timelines, f"simulated on {hardware}"))


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
    from moe_runtime.simulate.replay import gap_closed

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
                "predictor": result.predictor,
                "gap_closed": gap_closed(result, results),
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
    from moe_runtime.simulate.replay import gap_closed

    table = Table(title=title, title_justify="left")
    table.add_column("policy")
    for name in ("slots", "of experts", "hit rate", "hits", "misses", "LRU to Belady", "seconds"):
        table.add_column(name, justify="right")
    for result in results:
        closed = gap_closed(result, results)
        table.add_row(
            result.policy if result.predictor is None else f"{result.policy} + {result.predictor}",
            f"{result.slots}",
            f"{result.slots / accesses.num_keys:.1%}",
            f"{result.hit_rate:.4f}",
            f"{result.hits}",
            f"{result.misses}",
            "" if closed is None else f"{closed:.1%}",
            f"{result.seconds:.1f}",
        )
    return table
