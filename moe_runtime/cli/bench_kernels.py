"""`moe-runtime bench kernels`: how near the experts' kernel comes to the memory's rate."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from moe_runtime.cli.options import MODEL_PANEL, DeviceOption, Json
from moe_runtime.cli.terminal import Terminal

if TYPE_CHECKING:
    from moe_runtime.measure.bench.expert_forms import FormSpeed
    from moe_runtime.measure.bench.expert_steps import StepShare
    from moe_runtime.measure.bench.gpu_experts import GpuExpertsReport
    from moe_runtime.measure.bench.resident_decode import ResidentReport

EPILOG = """Examples:

moe-runtime bench kernels

moe-runtime bench kernels --like olmoe-1b-7b --layers 6 --rounds 20 --json

moe-runtime bench kernels --like mixtral-8x7b --device cuda --prefill 2048
"""


def kernels(
    like: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Shapes: tiny, olmoe-1b-7b, mixtral-8x7b, qwen3-30b-a3b, deepseek-v2-lite.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = "tiny",
    layers: Annotated[
        int | None,
        typer.Option(min=1, help="Layers instead of all.", rich_help_panel=MODEL_PANEL),
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Turns of everybody.")] = 20,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded in a turn.")] = 16,
    prefill: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 512,
    steps_only: Annotated[
        bool, typer.Option("--steps-only", help="No whole model: only steps of experts.")
    ] = False,
    device: DeviceOption = None,
    as_json: Json = False,
) -> None:
    """Measure experts in memory: share of the read rate, decode and prefill against transformers.

    Everything takes turns in one process, as the memory's rate drifts. On a GPU one layer is
    measured: steps of 1 to 64 tokens beside reads of its memory, and a prompt beside torch's
    grouped products.
    """
    terminal = Terminal(as_json=as_json)
    with terminal.waiting("starting"):
        from moe_runtime.integrations.transformers.device import single_device
        from moe_runtime.measure.bench.expert_forms import measure_forms
        from moe_runtime.measure.bench.expert_steps import measure_steps
        from moe_runtime.measure.bench.gpu_experts import measure_gpu_experts
        from moe_runtime.measure.bench.machine import (
            describe_machine,
            describe_versions,
            git_commit,
        )
        from moe_runtime.measure.bench.presets import load_preset
        from moe_runtime.measure.bench.resident_decode import measure_resident
        from moe_runtime.measure.probe.gpu_rate import gpu_device

        computes = single_device(device)
    preset = load_preset(like).changed(num_layers=layers)
    about = {
        "machine": describe_machine(Path.cwd(), computes),
        "versions": describe_versions(),
        "commit": git_commit(),
    }
    if computes.type == "cuda":
        with terminal.progress(f"experts of {like}") as meter:
            report = measure_gpu_experts(
                preset,
                gpu_device(computes.index or 0, None),
                rounds=rounds,
                prefill_tokens=prefill,
                on_round=meter.update,
            )
        if as_json:
            on_gpu = asdict(report) | {"is_green": report.is_green}
            terminal.show_json({**about, "steps": None, "resident": None, "gpu": on_gpu})
        else:
            terminal.show(_decode_table(report))
            terminal.show(_prefill_table(report))
        return
    with terminal.progress(f"steps of {like}") as meter:
        shares = measure_steps(preset, rounds=rounds, on_round=meter.update)
    with terminal.progress(f"packed and quantised experts of {like}") as meter:
        forms = measure_forms(preset, rounds=rounds, on_round=meter.update)
    resident = None
    if not steps_only:
        with terminal.progress(f"{preset.num_layers} layers of {like}") as meter:
            resident = measure_resident(
                preset,
                rounds=rounds,
                tokens_per_round=tokens,
                prefill_tokens=prefill,
                on_round=meter.update,
            )
    if as_json:
        found: dict[str, Any] = {
            **about,
            "steps": [asdict(share) for share in shares],
            "forms": [asdict(form) for form in forms],
            "resident": (
                None if resident is None else asdict(resident) | {"is_green": resident.is_green}
            ),
            "gpu": None,
        }
        terminal.show_json(found)
    else:
        terminal.show(_steps_table(shares))
        terminal.show(_forms_table(forms))
        if resident is not None:
            terminal.show(_resident_table(resident))
        terminal.remark("GPU: not measured")


def _steps_table(shares: "list[StepShare]") -> Table:
    table = Table(title=f"steps of {shares[0].shape}", title_justify="left")
    for name in ("tokens", "experts", "rows each", "MB", "GB/s", "reads GB/s", "share of reads"):
        table.add_column(name, justify="right")
    for one in shares:
        table.add_row(
            f"{one.tokens}",
            f"{one.num_experts}",
            f"{one.rows_per_expert}",
            f"{one.step_bytes / 1e6:.1f}",
            f"{one.gbps.median:.1f}",
            f"{one.read_gbps.median:.1f}",
            one.share.text(3),
        )
    return table


def _forms_table(forms: "list[FormSpeed]") -> Table:
    table = Table(title=f"fewer bytes, shapes of {forms[0].shape}", title_justify="left")
    for name in ("form", "of bytes", "tokens", "us", "times as fast", "share of reads"):
        table.add_column(name, justify="left" if name == "form" else "right")
    for one in forms:
        table.add_row(
            one.form,
            f"{one.share_of_bytes:.3f}",
            f"{one.tokens}",
            f"{one.microseconds.median:.0f}",
            one.speedup.text(2),
            one.share.text(3),
        )
    return table


def _decode_table(report: "GpuExpertsReport") -> Table:
    title = f"one layer of {report.shape} on {report.gpu}, experts by {report.experts}"
    table = Table(title=title, title_justify="left")
    for name in ("tokens", "MB a layer", "GB/s", "reads GB/s", "share of reads"):
        table.add_column(name, justify="right")
    for one in report.decode:
        figures = (f"{one.gbps.median:.0f}", f"{one.read_gbps.median:.0f}", one.share.text(3))
        if not report.is_green:  # no speed on a red gate
            figures = ("-", "-", "RED")
        table.add_row(f"{one.tokens}", f"{one.layer_bytes / 1e6:.1f}", *figures)
    return table


def _prefill_table(report: "GpuExpertsReport") -> Table:
    table = Table(title=f"a prompt of {report.prefill_tokens} tokens", title_justify="left")
    for name in ("experts by", "ms", "times grouped_mm", "error of a layer"):
        table.add_column(name, justify="left" if name == "experts by" else "right")
    for name, spread in report.prefill_ms.items():
        speedup = report.prefill_speedup.text(2) if name == "moe_runtime" else ""
        figures = (spread.text(3), speedup) if report.is_green else ("-", "RED")
        table.add_row(name, *figures, f"{report.errors[name]:.2e}")
    return table


def _resident_table(report: "ResidentReport") -> Table:
    title = f"{report.num_layers} layers of {report.shape}, experts by {report.experts}"
    table = Table(title=title, title_justify="left")
    table.add_column("variant")
    table.add_column("ms a token", justify="right")
    table.add_column("times the better peer", justify="right")
    table.add_column(f"ms of {report.prefill_tokens} tokens", justify="right")
    table.add_column("error of a layer", justify="right")
    for name, spread in report.decode_ms.items():
        error = report.errors.get(name)
        said = "" if error is None else f"{error:.2e}"
        if name in report.speedup and not report.is_green:  # no speed on a red gate
            table.add_row(name, "-", "-", "-", f"RED {said}")
            continue
        speedup, prefill = report.speedup.get(name), report.prefill_ms.get(name)
        table.add_row(
            name,
            spread.text(2),
            "" if speedup is None else speedup.text(2),
            "" if prefill is None else prefill.text(0),
            said,
        )
    return table
