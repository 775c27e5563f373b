"""`moe-runtime profile`: where the time of a decode step goes."""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from moe_runtime.cli.loading_view import LoadingView
from moe_runtime.cli.options import (
    MODEL_PANEL,
    OUTPUT_PANEL,
    TEXT_PANEL,
    DeviceOption,
    Dtype,
    DtypeOption,
    ExpertMemoryOption,
    Json,
    Model,
    Policy,
    PolicyOption,
    PredictorOption,
    Revision,
    TrustRemoteCode,
)
from moe_runtime.cli.outputs import check_writable
from moe_runtime.cli.prompts import read_prompts
from moe_runtime.cli.terminal import Terminal
from moe_runtime.expert_memory import ExpertMemory

if TYPE_CHECKING:
    from moe_runtime.measure.profile import BatchProfile, Profile

EPILOG = """Examples:

moe-runtime profile ./model --expert-memory 33% --prompts text.txt

moe-runtime profile ./model --batch 1,2,4,8,16 --plot steps.png --trace steps.json
"""

_MOST_ROWS = 12  # of operators and kernels on the screen; --json has all


def profile(
    model: Model,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help='Text whose tokens are forced: lines, or *.jsonl with {"prompt": ...}; - is '
            "standard input. Without it tokens are random.",
            rich_help_panel=TEXT_PANEL,
        ),
    ] = None,
    batch: Annotated[
        str, typer.Option(metavar="SIZES", help="Batch sizes, one after the other: 1,2,4,8.")
    ] = "1",
    prompt_tokens: Annotated[
        int,
        typer.Option(min=1, help="Tokens before the first step.", rich_help_panel=TEXT_PANEL),
    ] = 32,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps of each batch size.")] = 8,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="Write a Chrome trace of the first batch size, with lanes for disk and waits.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png",
            help="Draw the parts of a step over batch sizes (.png, .svg or .pdf).",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = None,
    expert_memory: ExpertMemoryOption = "auto",
    policy: PolicyOption = Policy.LRU,
    predictor: PredictorOption = "off",
    dtype: DtypeOption = Dtype.AUTO,
    device: DeviceOption = None,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact",
            help="Profile the path that equals the unmodified model bit for bit.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = False,
    linears: Annotated[
        bool,
        typer.Option(
            "--linears",
            help="Let the experts' kernel compute the other linear layers too.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Run decode steps under PyTorch's profiler: by part of the model, operator and kernel.

    The profiler takes time of its own; `step` is measured without it.
    """
    batches = _parse_batches(batch)
    texts = [] if prompts is None else read_prompts([], prompts)
    ExpertMemory.parse(expert_memory)  # before seconds of imports
    for path in (trace, plot):
        if path is not None:
            check_writable(path)
    terminal = Terminal(as_json=as_json)
    with terminal.waiting("starting"):
        from moe_runtime.measure.decoding import Decoding
        from moe_runtime.measure.generation_request import GenerationRequest
        from moe_runtime.measure.profile import ProfileRequest
        from moe_runtime.measure.profile import profile as run_profile
        from moe_runtime.report.profile_plots import check_plot_name, plot_profile
    if plot is not None:
        check_plot_name(plot)
    request = ProfileRequest(
        loading=GenerationRequest(
            model=model,
            prompts=texts,
            decoding=Decoding(),
            expert_memory=expert_memory,
            policy=policy,
            predictor=predictor,
            warm_start=False,
            exact=exact,
            linears=linears,
            dtype=dtype,
            device=device,
            revision=revision,
            trust_remote_code=trust_remote_code,
        ),
        batches=batches,
        prompt_tokens=prompt_tokens,
        num_steps=steps,
        trace=trace,
    )
    with terminal.warnings_as_remarks(), ExitStack() as on_screen:
        found = run_profile(request, _View(terminal, on_screen))
    if plot is not None:
        plot_profile(
            {
                each.batch: {
                    part: seconds / each.steps.num_steps
                    for part, seconds in each.steps.part_seconds.items()
                }
                for each in found.batches
            },
            {
                each.batch: each.tklqt_seconds
                for each in found.batches
                if each.tklqt_seconds is not None
            },
            plot,
            title=f"{Path(model).name or model}, {prompt_tokens} tokens before, {steps} steps",
            transition_batch=found.transition_batch,
        )
    if as_json:
        terminal.show_json(found.as_dict())
    else:
        _show(found, terminal)


def _parse_batches(written: str) -> list[int]:
    parts = [part.strip() for part in written.split(",")]
    try:
        sizes = [int(part) for part in parts]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1 or len(set(sizes)) < len(sizes):
        raise typer.BadParameter(
            f"--batch {written!r} is not a list of different whole numbers above 0; "
            "write --batch 1,2,4"
        )
    return sizes


class _View(LoadingView):
    def on_batch(self, done: int, total: int) -> None:
        self.show_progress("batch sizes", done, total)


def _show(found: "Profile", terminal: Terminal) -> None:
    terminal.show(_part_table(found))
    first = found.batches[0]
    terminal.show(_operator_table(first))
    if first.steps.kernels:
        terminal.show(_kernel_table(first))
        knee = found.transition_batch
        terminal.write(
            "no batch size makes kernels queue\n"
            if knee is None
            else f"kernels queue on the GPU from batch size {knee} on\n"
        )


def _part_table(found: "Profile") -> Table:
    """Milliseconds of a step on the host, a column a batch size."""
    table = Table(title="milliseconds a step, and share of it", title_justify="left")
    table.add_column("part")
    for each in found.batches:
        table.add_column(f"batch {each.batch}", justify="right")
    seconds: dict[str, list[float]] = {}
    for index, each in enumerate(found.batches):
        for part, value in each.steps.part_seconds.items():
            of_part = seconds.setdefault(part, [0.0] * len(found.batches))
            of_part[index] = value / each.steps.num_steps
    for part in sorted(seconds, key=lambda name: -seconds[name][0]):
        cells = [
            f"{1e3 * value:.2f} {value / (each.steps.seconds / each.steps.num_steps):5.1%}"
            for value, each in zip(seconds[part], found.batches, strict=True)
        ]
        table.add_row(part, *cells)
    table.add_section()
    rows: list[tuple[str, Any]] = [
        ("step, profiled", lambda e: f"{1e3 * e.steps.seconds / e.steps.num_steps:.2f}"),
        ("step", lambda e: f"{1e3 * e.step_seconds:.2f}"),
        ("tokens/s", lambda e: f"{e.batch / e.step_seconds:.1f}"),
        ("hit rate", lambda e: f"{e.hits / (e.hits + e.misses):.1%}"),
    ]
    if found.batches[0].tklqt_seconds is not None:
        rows.append(("launch and queue time (TKLQT)", lambda e: f"{1e3 * e.tklqt_seconds:.2f}"))
    for name, cell in rows:
        table.add_row(name, *(cell(each) for each in found.batches))
    return table


def _operator_table(found: "BatchProfile") -> Table:
    table = Table(title=f"operators, batch {found.batch}", title_justify="left")
    table.add_column("operator")
    for name in ("calls a step", "ms a step", "us a call"):
        table.add_column(name, justify="right")
    num = found.steps.num_steps
    for name, each in list(found.steps.operators.items())[:_MOST_ROWS]:
        microseconds = f"{1e6 * each.seconds / each.num:.1f}"
        milliseconds = f"{1e3 * each.seconds / num:.3f}"
        table.add_row(name, f"{each.num / num:.0f}", milliseconds, microseconds)
    return table


def _kernel_table(found: "BatchProfile") -> Table:
    table = Table(title=f"kernels, batch {found.batch}", title_justify="left")
    table.add_column("kernel")
    for name in ("launches a step", "ms a step", "us launch and queue"):
        table.add_column(name, justify="right")
    num = found.steps.num_steps
    for kernel in found.steps.kernels[:_MOST_ROWS]:
        queued = f"{1e6 * kernel.queue_seconds / kernel.num:.1f}"
        milliseconds = f"{1e3 * kernel.seconds / num:.3f}"
        table.add_row(kernel.name, f"{kernel.num / num:.0f}", milliseconds, queued)
    return table
