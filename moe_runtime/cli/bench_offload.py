"""`moe-runtime bench offload`: decode with part of the experts in memory, against peers."""

import shlex
import sys
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.status import Status
from rich.table import Table as Grid
from rich.text import Text

from moe_runtime.cli.options import (
    MODEL_PANEL,
    OUTPUT_PANEL,
    DeviceOption,
    Json,
    Policy,
    PredictorOption,
)
from moe_runtime.cli.outputs import check_writable
from moe_runtime.cli.terminal import Terminal

if TYPE_CHECKING:
    from moe_runtime.measure.bench.report import Report
    from moe_runtime.measure.bench.settings import Progress

EPILOG = """Examples:

moe-runtime bench offload --like tiny --residency 65 --peers none

moe-runtime bench offload --like olmoe-1b-7b --layers 6 --residency 65,35 -o report.md

moe-runtime bench offload --like olmoe-1b-7b --layers 6 --residency 35 --peers none --routing uniform,trace:T.npz

moe-runtime bench offload --like qwen3-30b-a3b --layers 12 --device cuda --routing trace:T.npz
"""  # noqa: E501  (a command to copy stays on one line)

_DEFAULT_LIKE = "olmoe-1b-7b"
_DEFAULT_LAYERS = 6  # 5 GB in bfloat16
_WIDTH = 112  # below it figures would break in the middle, also in a log
_PLAN_PANEL = "What is measured"


class Totals(StrEnum):
    """What is equal: memory for weights and buffers over a process's own, or all of it."""

    WEIGHTS = "weights"
    EQUAL = "equal"


def offload(
    like: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Shapes for a random checkpoint: tiny, olmoe-1b-7b (the default, with 6 layers), "
            "mixtral-8x7b, qwen3-30b-a3b, deepseek-v2-lite.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(min=1, help="Layers instead of all.", rich_help_panel=MODEL_PANEL),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="A checkpoint instead of a random one.", rich_help_panel=MODEL_PANEL
        ),
    ] = None,
    residency: Annotated[
        str | None,
        typer.Option(
            metavar="PERCENTS",
            help="Percent of the weights that fit in memory, by commas: of the CPU (100,65,35) or, "
            "if it computes, of the GPU (100,50,25,12.5).",
            rich_help_panel=_PLAN_PANEL,
        ),
    ] = None,
    routing: Annotated[
        str,
        typer.Option(
            metavar="WHO",
            help="Who chooses experts: forced (random tokens, the model's router), uniform, or "
            "trace:FILE.npz; several by commas are compared.",
            rich_help_panel=_PLAN_PANEL,
        ),
    ] = "forced",
    peers: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="all, none, or by commas: transformers, accelerate, deepspeed, and on the CPU "
            "llama.cpp, on a GPU moe-policylang.",
            rich_help_panel=_PLAN_PANEL,
        ),
    ] = "all",
    totals: Annotated[
        Totals,
        typer.Option(
            help="Cap memory at the share of the weights plus each process's own after imports, or "
            "at the same total for all.",
            rich_help_panel=_PLAN_PANEL,
        ),
    ] = Totals.WEIGHTS,
    exact: Annotated[
        bool, typer.Option("--exact", help="Our exact path, with a gate that asks for equal bits.")
    ] = False,
    policy: Annotated[
        Policy,
        typer.Option(
            help="Which expert makes room in moe_runtime's cache.", rich_help_panel=_PLAN_PANEL
        ),
    ] = Policy.LRU,
    predictor: PredictorOption = "off",
    steps: Annotated[
        int,
        typer.Option(min=6, help="Tokens a contestant and table.", rich_help_panel=_PLAN_PANEL),
    ] = 480,
    seconds: Annotated[
        float,
        typer.Option(
            min=1.0,
            help="Time for the rounds of a table: a slow contestant decodes fewer tokens.",
            rich_help_panel=_PLAN_PANEL,
        ),
    ] = 400.0,
    device: DeviceOption = None,
    work_folder: Annotated[
        Path,
        typer.Option(
            metavar="DIR", help="For checkpoints and scratch files.", rich_help_panel=OUTPUT_PANEL
        ),
    ] = Path("build"),
    as_json: Json = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="REPORT.md",
            help="Write the report as a page.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = None,
) -> None:
    """Decode with part of the experts in memory, beside other runtimes on the same weights.

    Contestants are processes of their own with equal memory caps (Linux control groups, as root or
    delegated; on a GPU torch's allocator), take turns on the same tokens, and must compute the same
    before a speed is printed. Exit code 1 if one does not.
    """
    if output is not None:
        check_writable(output)
    residencies = None if residency is None else _read_residency(residency)
    if model is not None and (like is not None or layers is not None):
        raise typer.BadParameter("give --model, or --like and --layers, not both")
    if like is None:
        like, layers = _DEFAULT_LIKE, layers or _DEFAULT_LAYERS
    terminal = Terminal(as_json=as_json)
    with terminal.waiting("starting") as status:
        from moe_runtime.measure.bench.markdown import as_markdown
        from moe_runtime.measure.bench.run import Request, run

        request = Request(
            command=shlex.join(["moe-runtime", *sys.argv[1:]]),
            device=device,
            like=like,
            num_layers=layers,
            model=model,
            residencies=residencies,
            routing=routing,
            peers=peers,
            equal_totals=totals is Totals.EQUAL,
            policy=policy,
            predictor=predictor,
            exact=exact,
            num_steps=steps,
            seconds=seconds,
            work_folder=work_folder,
        )
        report = run(request, _progress(terminal, status), _bytes_on(status))
    if output is not None:
        output.write_text(as_markdown(report), encoding="utf-8")
    if as_json:
        terminal.show_json(report.as_dict())
    else:
        _show(terminal, report)
    if not report.is_green:
        raise typer.Exit(1)


def _read_residency(text: str) -> tuple[float, ...]:
    found = []
    for part in text.split(","):
        try:
            percent = float(part.strip().removesuffix("%"))
        except ValueError:
            percent = 0.0
        if not 0 < percent <= 100:
            raise typer.BadParameter(
                f"--residency {part.strip()!r} is not a percentage above 0 and up to 100; "
                "write for example 65,35"
            )
        found.append(percent / 100)
    return tuple(found)


def _bytes_on(status: Status) -> Callable[[str, int, int], None]:
    def show(what: str, done: int, total: int) -> None:
        written = f"writing the {what}, {done / 1e9:.1f} of {total / 1e9:.1f} GB"
        status.update(Text(written, style="dim"))

    return show


def _progress(terminal: Terminal, status: Status) -> "Progress":
    """Stages as lines, which a log keeps; rounds and the time left in the spinner."""
    from moe_runtime.measure.bench.settings import Progress

    stage, started = "", time.monotonic()

    def on_stage(text: str) -> None:
        nonlocal stage, started
        stage, started = text, time.monotonic()
        terminal.remark(text)
        status.update(Text(text, style="dim"))

    def on_round(done: int, total: int) -> None:
        left = (time.monotonic() - started) / done * (total - done) if done else 0.0
        when = f", about {left:.0f} s left" if done else ""
        status.update(Text(f"{stage}: round {done + 1} of {total}{when}", style="dim"))

    return Progress(on_stage=on_stage, on_round=on_round)


def _show(terminal: Terminal, report: "Report") -> None:
    from moe_runtime.measure.bench.markdown import (
        COLUMNS,
        cells,
        comparison_lines,
        heading,
        remarks,
        title,
    )

    for line in heading(report):
        terminal.write(f"{line}\n")
    for table in report.tables:
        # Names for titles, spreads on two lines and no cap, which the title says.
        columns = [name for name in COLUMNS if name != "cap"]
        grid = Grid(
            *columns, title=title(table), title_justify="left", box=SIMPLE_HEAD, width=_WIDTH
        )
        for row in table.rows:
            texts = dict(zip(COLUMNS, cells(row), strict=True)) | {"contestant": row.name}
            broken = [texts[name].replace(" (", "\n(").replace(", ", ",\n") for name in columns]
            grid.add_row(*broken)
        terminal.show(grid)
        for line in remarks(table):
            terminal.write(f"  {line}\n")
    for line in comparison_lines(report):
        terminal.write(f"{line}\n")
