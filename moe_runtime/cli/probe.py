"""`moe-runtime probe`: what this machine can do, measured, and written as a hardware file."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from moe_runtime.cli.options import OUTPUT_PANEL, RANKS_PANEL, Json
from moe_runtime.cli.outputs import check_writable
from moe_runtime.cli.terminal import Terminal
from moe_runtime.expert_memory import format_bytes

if TYPE_CHECKING:
    from moe_runtime.perf.hardware import Gpu, Hardware, Matmul

EPILOG = """Examples:

moe-runtime probe

moe-runtime probe --path ./model -o machine.yaml

moe-runtime probe --json

torchrun --nproc-per-node 4 -m moe_runtime probe --collectives -o interconnect.yaml
"""

_Row = tuple[str, str, float, tuple[float, float] | None, str]


def probe(
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="Write the hardware file here, in YAML.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = None,
    path: Annotated[
        Path,
        typer.Option(
            "--path", metavar="DIR", help="The folder that holds, or will hold, the model."
        ),
    ] = Path(),
    collectives: Annotated[
        bool,
        typer.Option(
            "--collectives",
            help="Under torchrun: measure messages between ranks instead, for generate --pipeline.",
            rich_help_panel=RANKS_PANEL,
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure disk, memory, matrix products and GPUs of this machine. Takes under a minute.

    Reads the checkpoint files in DIR at random places; where there is no large one, writes a
    scratch file of up to 1 GiB, which has no name and vanishes in any case.
    """
    if output is not None:
        check_writable(output)
    terminal = Terminal(as_json=as_json)
    if collectives:
        from moe_runtime.cli.probe_collectives import probe_collectives_and_show

        probe_collectives_and_show(terminal, output)
        return
    with terminal.waiting("starting") as status:
        from moe_runtime.measure.probe.probe import probe as measure

        def show(part: str) -> None:
            status.update(Text(part, style="dim"))

        measured = measure(path.absolute(), on_progress=show)
    hardware = measured.hardware
    for remark in measured.remarks:
        terminal.warn(remark)
    if as_json:
        terminal.show_json(measured.as_dict())
    else:
        terminal.show(_table(hardware))
    if output is not None:
        hardware.save(output)
        terminal.remark(f"wrote {output}")


def _table(hardware: "Hardware") -> Table:
    table = Table(
        "what",
        "setting",
        "GB/s",
        "quartiles",
        "beside it",
        title=_title(hardware),
        caption="\n".join(_captions(hardware)),
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for column in table.columns[2:4]:
        column.justify = "right"
        column.no_wrap = True
    before = ""
    for what, setting, median, quartiles, beside in _rows(hardware):
        if before and what != before:
            table.add_section()
        low_to_high = "" if quartiles is None else f"{quartiles[0]:.3g} to {quartiles[1]:.3g}"
        name = "" if what == before else what
        table.add_row(name, setting, f"{median:.3g}", low_to_high, beside)
        before = what
    return table


def _title(hardware: "Hardware") -> str:
    cpu, memory = hardware.cpu, hardware.memory
    return (
        f"{cpu.model}, {cpu.physical_cores} cores, {cpu.threads} threads, "
        f"{format_bytes(memory.total_bytes)}"
    )


def _captions(hardware: "Hardware") -> Iterator[str]:
    disk, matmul = hardware.disk, hardware.matmul
    if disk is not None:
        how = "O_DIRECT" if disk.direct else "dropped from the page cache before each read"
        yield f"disk: {disk.read_from}; {disk.file_system}, {how}"
        if disk.beside_compute is not None:
            yield (
                f"both at work: the disk, one read at a time, keeps "
                f"{disk.beside_compute.read_share:.0%} of its rate, computing "
                f"{disk.beside_compute.compute_share:.0%}"
            )
    if matmul is not None:
        yield _shape("weights", matmul)
    for index, gpu in enumerate(hardware.gpus):
        yield f"GPU {index}: {_gpu_facts(gpu)}"
        if gpu.matmul is not None:
            yield _shape(f"GPU {index} weights", gpu.matmul)


def _shape(name: str, matmul: "Matmul") -> str:
    outputs, inputs = matmul.weight_shape
    return (
        f"{name}: {outputs} x {inputs}, in no cache, by torch or the kernel named; "
        "% of memory reads within the same second"
    )


def _rows(hardware: "Hardware") -> Iterator[_Row]:
    memory, disk = hardware.memory, hardware.disk
    yield "memory", "read", memory.read_gbps, memory.read_gbps_quartiles, ""
    yield "memory", "copy", memory.copy_gbps, memory.copy_gbps_quartiles, "copied bytes, once"
    if disk is not None:
        for read in disk.reads:
            setting = f"{format_bytes(read.block_bytes)}, depth {read.depth}"
            beside = "best" if read is disk.best else ""
            yield "disk", setting, read.gbps, read.gbps_quartiles, beside
    yield from _matmul_rows("weights", hardware.matmul)
    for index, gpu in enumerate(hardware.gpus):
        yield from _gpu_rows(f"GPU {index} ", gpu)


def _matmul_rows(what: str, matmul: "Matmul | None") -> Iterator[_Row]:
    if matmul is None:
        return
    for rate in matmul.rates:
        kernel = "" if rate.kernel == "torch" else f", {rate.kernel}"
        setting = f"{rate.dtype}, {rate.rows} row{'' if rate.rows == 1 else 's'}{kernel}"
        beside = f"{rate.gflops:.3g} GFLOP/s"
        if rate.share_of_read is not None:
            beside += f", {100 * rate.share_of_read:.2g} %"
        yield what, setting, rate.weights_gbps, rate.weights_gbps_quartiles, beside


def _gpu_rows(prefix: str, gpu: "Gpu") -> Iterator[_Row]:
    rates = (
        ("memory", "read", gpu.memory_read_gbps, gpu.memory_read_gbps_quartiles),
        ("memory", "copy", gpu.memory_copy_gbps, gpu.memory_copy_gbps_quartiles),
        ("link", "pinned to GPU", gpu.pinned_to_gpu_gbps, gpu.pinned_to_gpu_gbps_quartiles),
        ("link", "GPU to pinned", gpu.gpu_to_pinned_gbps, gpu.gpu_to_pinned_gbps_quartiles),
        ("link", "pageable to GPU", gpu.pageable_to_gpu_gbps, gpu.pageable_to_gpu_gbps_quartiles),
        ("link", "GPU to pageable", gpu.gpu_to_pageable_gbps, gpu.gpu_to_pageable_gbps_quartiles),
    )
    for what, setting, median, quartiles in rates:
        if median is not None:
            yield prefix + what, setting, median, quartiles, ""
    yield from _matmul_rows(f"{prefix}weights", gpu.matmul)


def _gpu_facts(gpu: "Gpu") -> str:
    facts = [gpu.name, format_bytes(gpu.memory_bytes), f"compute {gpu.compute_capability}"]
    if gpu.sm_clock_mhz is not None:
        facts.append(f"{gpu.sm_clock_mhz} MHz")
    if gpu.memory_clock_mhz is not None:
        facts.append(f"memory {gpu.memory_clock_mhz} MHz")
    if gpu.pcie_generation is not None and gpu.pcie_width is not None:
        facts.append(f"PCIe {gpu.pcie_generation} x{gpu.pcie_width}")
    if gpu.power_limit_watts is not None:
        facts.append(f"{gpu.power_limit_watts:g} W")
    return ", ".join(facts)
