"""`moe-runtime bench parallel`: bytes that ranks exchange for the routing of a trace."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from moe_runtime.cli.options import Json, TimeoutSeconds
from moe_runtime.cli.placement_data import split_traces
from moe_runtime.cli.placement_options import HoldOut
from moe_runtime.cli.terminal import Terminal

if TYPE_CHECKING:
    from moe_runtime.measure.bench.rank_traffic import TrafficRow
    from moe_runtime.measure.bench.simulated_times import SimulatedTime
    from moe_runtime.placement.cocluster import DeviceTables

SIMULATION_PANEL = "Simulation"
EPILOG = """Examples:

torchrun --nproc-per-node 4 -m moe_runtime bench parallel T.npz --model-dim 2880

torchrun --nproc-per-node 4 -m moe_runtime bench parallel T.npz --placement p.json --top-k 2 --json

torchrun --nproc-per-node 4 -m moe_runtime bench parallel T.npz --interconnect interconnect.yaml
"""


def parallel(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="A routing trace, .npz.")],
    placement: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="Beside equal parts, this placement. May be given several times."
        ),
    ] = None,
    tables: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="For the speculative dispatcher: what `placement solve --tables` wrote with the "
            "one --placement. The trace must have token ids.",
        ),
    ] = None,
    model_dim: Annotated[
        int, typer.Option(min=4, help="Numbers of a hidden state, of two bytes each.")
    ] = 2880,
    kv_dim: Annotated[
        int,
        typer.Option(
            min=2,
            help="Numbers that attention caches of a token in a layer: 2 x key heads x their size, "
            "or a latent's. 1024 is gpt-oss's.",
        ),
    ] = 1024,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Only each token's first experts, so many of them.")
    ] = None,
    tokens: Annotated[
        str, typer.Option(metavar="LIST", help="Tokens a rank in one forward.")
    ] = "1,16,256",
    max_tokens: Annotated[
        int, typer.Option(min=1, help="At most so many tokens of the trace for the formulas.")
    ] = 16384,
    sent_tokens: Annotated[
        int, typer.Option(min=1, help="About so many of them are sent between the ranks as well.")
    ] = 64,
    nodes: Annotated[
        int, typer.Option(min=1, help="Count equal parts as if ranks stood on so many nodes.")
    ] = 1,
    interconnect: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Simulate times on more GPUs too, from a file of probe --collectives.",
            rich_help_panel=SIMULATION_PANEL,
        ),
    ] = None,
    gpus: Annotated[
        str, typer.Option(metavar="LIST", help="How many.", rich_help_panel=SIMULATION_PANEL)
    ] = "8,64,512",
    gpu_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of each.", rich_help_panel=SIMULATION_PANEL)
    ] = 32,
    hold_out: HoldOut = 0.2,
    timeout_seconds: TimeoutSeconds = None,
    as_json: Json = False,
) -> None:
    """Replay routing on all ranks and count what leaves each, beside what formulas say.

    Of the trace only the part is used that `placement solve` with the same --hold-out never saw.
    Bytes, not seconds: processes of one machine say nothing about a network's time. With
    --interconnect times are simulated, from formulas and the file alone.
    """
    sizes, simulated_gpus = _sizes("--tokens", tokens), _sizes("--gpus", gpus)
    terminal = Terminal(as_json=as_json)
    is_first = os.environ.get("RANK", "0") == "0"
    with terminal.waiting("starting"):
        from moe_runtime.measure.bench.rank_traffic import (
            WITHOUT_DEDUPLICATION,
            Replay,
            measure_traffic,
            routing_of,
            token_ids_of,
        )
        from moe_runtime.measure.bench.stepped_rows import Stepped, measure_stepped
        from moe_runtime.parallel.plan import check_placement, linear_placement
        from moe_runtime.parallel.world import World
        from moe_runtime.perf.interconnect import Interconnect
        from moe_runtime.placement_map import Placement
        from moe_runtime.trace import Trace

        loaded = Trace.load(trace, leave_out=("weights", "gate_probs", "hidden"))
        held_out = split_traces(terminal, [loaded], hold_out).held_out
        judged = held_out[0] if held_out else loaded
        routing = routing_of(judged.topk, top_k=top_k, source=f"trace {trace}")
        network = None if interconnect is None else Interconnect.load(interconnect)
        given = {file.name: Placement.load(file) for file in placement or []}
        stepped = Stepped(
            kv_dim=kv_dim,
            tables=_tables_of(tables, list(given), judged.token_id is not None),
            token_id=token_ids_of(judged.topk, judged.token_id),
        )
        world = World.join(timeout_seconds=timeout_seconds)
    is_together = False
    try:
        shape = {"num_experts": loaded.num_experts, "num_layers": loaded.num_layers}
        if world.num_ranks % nodes:
            raise typer.BadParameter(
                f"--nodes {nodes} does not divide {world.num_ranks} ranks; nodes are equally large"
            )
        linear = linear_placement(
            model=loaded.model,
            checkpoint=loaded.checkpoint,
            num_ranks=world.num_ranks,
            num_nodes=nodes,
            **shape,
        )
        for found in given.values():
            check_placement(found, num_ranks=world.num_ranks, checkpoint=loaded.checkpoint, **shape)
        replay = Replay(
            topk=routing,
            num_experts=loaded.num_experts,
            num_ranks=world.num_ranks,
            model_dim=model_dim,
        )
        with terminal.progress("counting") as meter:
            rows = measure_traffic(
                world.ledger,
                replay,
                {"equal parts": linear, **given},
                tokens_per_rank=sizes,
                max_tokens=max_tokens,
                sent_tokens=sent_tokens,
                on_progress=meter.update if is_first else lambda done, total: None,
            )
            rows += measure_stepped(
                world.ledger,
                replay,
                {"equal parts": linear, **given},
                stepped,
                max_tokens=max_tokens,
                sent_tokens=sent_tokens,
                yardsticks={
                    row.tokens_per_rank: row.bytes_per_token_layer
                    for row in reversed(rows)
                    if row.dispatcher == WITHOUT_DEDUPLICATION
                },
                on_progress=meter.update if is_first else lambda done, total: None,
            )
        is_together = True
    finally:
        world.close(orderly=is_together)
    if not is_first:
        return
    rows.sort(key=lambda row: sizes.index(row.tokens_per_rank))
    times: list[SimulatedTime] = []
    if network is not None:
        from moe_runtime.measure.bench.simulated_times import simulate_times

        with terminal.progress("simulating") as meter:
            times = simulate_times(
                network,
                replay,
                gpus=simulated_gpus,
                tokens_per_rank=gpu_tokens,
                on_progress=meter.update,
            )
    _show(terminal, rows, times, trace, world.num_ranks, replay.topk.shape[2], model_dim)


def _tables_of(
    file: Path | None, placements: list[str], has_ids: bool
) -> "dict[str, DeviceTables]":
    """By placement."""
    from moe_runtime.placement.cocluster import DeviceTables

    if file is None:
        return {}
    if len(placements) != 1:
        raise typer.BadParameter(
            f"--tables belongs to one placement, and {len(placements)} are given; give the one "
            "--placement that it was written with"
        )
    if not has_ids:
        raise typer.BadParameter(
            "--tables looks up token ids, which the trace has not; record it with `trace record`"
        )
    return {placements[0]: DeviceTables.load(file)}


def _sizes(option: str, text: str) -> list[int]:
    sizes = [int(word) if word.strip().isdigit() else 0 for word in text.split(",")]
    if not all(sizes):
        raise typer.BadParameter(f"{option} {text!r} is no list of numbers above 0; write 1,16,256")
    return sizes


def _show(
    terminal: Terminal,
    rows: "list[TrafficRow]",
    times: "list[SimulatedTime]",
    trace: Path,
    ranks: int,
    top_k: int,
    dim: int,
) -> None:
    from dataclasses import asdict

    if terminal.as_json:
        facts: dict[str, object] = {
            "trace": str(trace),
            "ranks": ranks,
            "top_k": top_k,
            "model_dim": dim,
        }
        facts |= {"rows": [asdict(row) for row in rows]}
        terminal.show_json({**facts, "simulated": [asdict(time) for time in times]})
        return
    title = f"{trace.name}, top-{top_k}, {ranks} ranks, hidden states of {dim} x 2 bytes"
    table = Table(title=title, title_justify="left")
    for name in ("tokens a rank", "placement", "dispatcher"):
        table.add_column(name)
    between = ("between nodes",) if any(row.bytes_between_nodes for row in rows) else ()
    bytes_of = ("bytes a token and layer", "in MoE layers", *between)
    for name in (*bytes_of, "ratio", "counted", "by formula"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            f"{row.tokens_per_rank}",
            row.placement,
            row.dispatcher,
            f"{row.bytes_per_token_layer:.0f}",
            f"{row.moe_bytes_per_token_layer or row.bytes_per_token_layer:.0f}",
            *(f"{row.bytes_between_nodes:.0f}" for _ in between),
            f"{row.ratio:.3f}",
            "" if row.counted_bytes is None else f"{row.counted_bytes}",
            "" if row.counted_formula_bytes is None else f"{row.counted_formula_bytes}",
        )
    terminal.show(table)
    for row in rows:
        if row.local_activation_rate is not None:
            terminal.write(
                f"{row.dispatcher}, {row.placement}, {row.tokens_per_rank} tokens a rank: experts "
                f"found where tokens wait, {_shares(row.local_activation_rate)}; 1/G is "
                f"{1 / ranks:.3f}\n"
            )

    if times:
        terminal.show(_times(times))


def _times(times: "list[SimulatedTime]") -> Table:
    title = (
        f"simulated, not measured: messages of one layer, {times[0].tokens_per_rank} tokens a GPU, "
        "equal parts"
    )
    table = Table(title=title, title_justify="left")
    for name in ("GPUs", "nodes", "dispatcher"):
        table.add_column(name)
    for name in ("bytes of the busiest", "simulated ms"):
        table.add_column(name, justify="right")
    for time in times:
        table.add_row(
            f"{time.gpus}",
            f"{time.nodes}",
            time.dispatcher,
            f"{time.busiest_bytes:.0f}",
            f"{1e3 * time.simulated_seconds:.3g}",
        )
    return table


def _shares(rates: "dict[str, float | None]") -> str:
    known = {name: rate for name, rate in rates.items() if rate is not None}
    return ", ".join(f"{rate:.3f} of {name} ids" for name, rate in known.items())
