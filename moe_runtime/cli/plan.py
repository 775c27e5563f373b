"""`moe-runtime plan`: which settings a model should run with on a machine, and how fast it will."""

from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from moe_runtime.cli.options import MEMORY_PANEL, OUTPUT_PANEL, Json
from moe_runtime.cli.outputs import check_writable
from moe_runtime.cli.terminal import Terminal
from moe_runtime.errors import ConfigError
from moe_runtime.expert_memory import ExpertMemory, format_bytes

if TYPE_CHECKING:
    from moe_runtime.model_spec import ModelSpec
    from moe_runtime.perf.hardware import Hardware
    from moe_runtime.perf.hit_curve import HitCurve
    from moe_runtime.perf.plan import Candidate, Plan

EPILOG = """Examples:

moe-runtime plan ./model

moe-runtime plan mixtral-8x7b --hardware rtx4090 --goal throughput

moe-runtime plan qwen3-30b-a3b --hardware machine.yaml --memory 16GiB --plot plan.png --json
"""

WORKLOAD_PANEL = "Workload"
MACHINE_PANEL = "Machine"
_AUTO = "auto"


class PlanGoal(StrEnum):
    """What is to be made as good as possible."""

    LATENCY = "latency"
    THROUGHPUT = "throughput"


def plan(
    model: Annotated[
        str, typer.Argument(metavar="MODEL|PRESET", help="A folder, or a file of configs/models.")
    ],
    hardware: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.yaml|NAME",
            help="A file of `moe-runtime probe`, or one of configs/hardware such as rtx4090; this "
            "machine, measured in a second, by default.",
            rich_help_panel=MACHINE_PANEL,
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Of the memory where experts are computed, use at most so much: 16GiB.",
            rich_help_panel=MACHINE_PANEL,
        ),
    ] = None,
    host_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="With a GPU: of the host's memory, use at most so much.",
            rich_help_panel=MACHINE_PANEL,
        ),
    ] = None,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Of one sequence.", rich_help_panel=WORKLOAD_PANEL)
    ] = 512,
    new_tokens: Annotated[
        int, typer.Option(min=1, help="Of one sequence.", rich_help_panel=WORKLOAD_PANEL)
    ] = 128,
    batch: Annotated[
        str,
        typer.Option(
            metavar="N|auto",
            help="Sequences at a time; auto is 1 for latency, what is fastest for throughput.",
            rich_help_panel=WORKLOAD_PANEL,
        ),
    ] = _AUTO,
    goal: Annotated[
        PlanGoal,
        typer.Option(
            help="The most tokens a second in decoding, or of whole batches, prompts included.",
            rich_help_panel=WORKLOAD_PANEL,
        ),
    ] = PlanGoal.LATENCY,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="T.npz",
            help="Take hit rates from this recorded routing, not from a prior.",
            rich_help_panel=WORKLOAD_PANEL,
        ),
    ] = None,
    allow_lossy: Annotated[
        bool,
        typer.Option(
            "--allow-lossy",
            help="Consider experts rounded to int8 and int4 too.",
            rich_help_panel=MEMORY_PANEL,
        ),
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png",
            help="Draw what a step waits for, best settings first (.png, .svg or .pdf).",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Choose slots, cache, kernels and batch together, and say what limits them.

    Nothing is loaded or run: figures are a model's, from shapes and rates alone, and no
    measurement. `generate --plan auto` runs the best plans for a few steps and keeps the fastest.
    """
    terminal = Terminal(as_json=as_json)
    num_batch = _whole_batch(batch)
    most_bytes, most_host_bytes = _size(memory), _size(host_memory)
    if plot is not None:
        check_writable(plot)
    with terminal.waiting("planning"):
        from moe_runtime.integrations.transformers.spec_reader import read_spec
        from moe_runtime.perf.plan import PlanRequest
        from moe_runtime.perf.planner import make_plan

        if plot is not None:
            from moe_runtime.report.plots import check_plot_name

            check_plot_name(plot)
        spec = read_spec(model)
        machine = _machine(hardware, Path(model), spec, terminal)
        request = PlanRequest(
            spec=spec,
            hardware=machine,
            goal=goal.value,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            batch=num_batch,
            allows_lossy=allow_lossy,
            curves={} if trace is None else _curves(trace),
            memory_bytes=most_bytes,
            host_memory_bytes=most_host_bytes,
        )
        found = make_plan(request)
    if plot is not None:
        from moe_runtime.report.plan_plots import plot_plan

        plot_plan(found, plot, title=f"{spec.name} on {_machine_name(machine)}")
    if as_json:
        terminal.show_json(
            {"model": spec.name, "hardware": _machine_name(machine)} | found.as_dict()
        )
        return
    terminal.show(_table(found, f"{spec.name} on {_machine_name(machine)}"))
    for remedy in found.what_would_help:
        terminal.write(f"{remedy.change}: {remedy.factor:.2g}x\n")
    for assumption in found.assumptions:
        terminal.remark(f"assumed: {assumption}")


def _whole_batch(batch: str) -> int | None:
    if batch == _AUTO:
        return None
    if batch.isdigit() and int(batch) > 0:
        return int(batch)
    raise typer.BadParameter(f"--batch {batch!r} is neither {_AUTO} nor a number from 1 on")


def _size(written: str | None) -> int | None:
    if written is None:
        return None
    num_bytes = ExpertMemory.parse(written).num_bytes
    if num_bytes is None:
        raise typer.BadParameter(f"{written!r} is not a size; write 16GiB")
    return num_bytes


def _machine(name: str | None, model: Path, spec: "ModelSpec", terminal: Terminal) -> "Hardware":
    """Of a file, a preset, or this machine, which is also the fallback for unknown names."""
    from moe_runtime.perf.hardware import Hardware
    from moe_runtime.perf.hardware_presets import hardware_preset_names, load_hardware_preset

    if name is not None:
        if name in hardware_preset_names():
            return load_hardware_preset(name)
        if Path(name).suffix or Path(name).exists():
            return Hardware.load(Path(name))
        terminal.warn(
            f"no hardware is called {name!r}, there are {', '.join(hardware_preset_names())}; "
            "this machine is measured instead"
        )
    from moe_runtime.measure.this_machine import gpus_without_preset, this_machine

    folder = model if model.is_dir() else Path()
    unknown = gpus_without_preset()
    if unknown:
        terminal.remark(f"no preset knows {', '.join(unknown)}: probing, which takes a minute")
        from moe_runtime.measure.probe.probe import probe

        return probe(folder).hardware
    return this_machine(folder, read_bytes=spec.expert_bytes)


def _machine_name(hardware: "Hardware") -> str:
    sheet = " (datasheet)" if hardware.source == "datasheet" else ""
    return (hardware.gpus[0].name if hardware.gpus else hardware.cpu.model) + sheet


def _curves(trace: Path) -> "dict[str, HitCurve]":
    from moe_runtime.perf.latency import LFU, LRU
    from moe_runtime.simulate.hit_rates import hit_curve
    from moe_runtime.trace import Trace
    from moe_runtime.trace_fields import FIELDS

    found = Trace.load(trace, leave_out=set(FIELDS) - {"topk", "step"})
    if found.num_tokens == 0:
        raise ConfigError(f"{trace} holds no tokens; record one with moe-runtime trace record")
    return {policy: hit_curve(found, policy=policy) for policy in (LRU, LFU)}


def _table(found: "Plan", title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    table.add_column("chosen")
    second = found.runner_up
    if second is not None:
        table.add_column("runner-up")
        for one, other in zip(_rows(found.chosen), _rows(second), strict=True):
            table.add_row(*one, other[1])
    else:
        for one in _rows(found.chosen):
            table.add_row(*one)
    table.add_section()
    table.add_row("bottleneck", found.bottleneck)
    return table


def _rows(candidate: "Candidate") -> Iterator[tuple[str, str]]:
    settings, memory, step = candidate.settings, candidate.memory, candidate.step
    yield "tokens a second, predicted", f"{candidate.tokens_per_second:.4g}"
    yield "batch, prompts at a time", f"{settings.batch}, {settings.micro_batch}"
    yield "expert slots", f"{settings.num_slots} in {format_bytes(settings.expert_memory)}"
    if settings.kv_place == "gpu":
        yield "experts on the host", format_bytes(settings.host_memory)
        yield "missing experts", settings.miss
    yield "experts held as", f"{settings.expert_slots}, dtype {settings.expert_dtype}"
    yield "policy, predictor", f"{settings.policy}, {settings.predictor}"
    yield "linear layers in the kernel", "yes" if settings.linears else "no"
    yield "reads", "through the page cache" if settings.page_cache else "past the page cache"
    yield "threads", f"{settings.threads}"
    yield "attention cache", f"{format_bytes(settings.kv_bytes)} on the {settings.kv_place}"
    yield "dense weights", format_bytes(memory.dense_bytes)
    yield "left free", format_bytes(memory.reserve_bytes + memory.free_bytes)
    yield "hit rate, expected", f"{step.hit_rate:.3f}"
    yield "one step", f"{1e3 * step.seconds:.4g} ms"
    for lane, seconds in step.lanes.items():
        if seconds:
            yield f"  {lane.value}", f"{1e3 * seconds:.4g} ms"
    yield "prefill", f"{candidate.prefill_seconds:.4g} s"
