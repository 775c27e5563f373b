"""`moe-runtime trace import`: routing that others wrote, as a trace."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from moe_runtime.cli.options import Json
from moe_runtime.cli.outputs import check_writable
from moe_runtime.cli.terminal import Terminal

EPILOG = """Examples:

moe-runtime trace import day1.npz day2.npz --from npz -o both.npz

moe-runtime trace import routing.csv --from csv --num-experts 64 -o routing.npz

moe-runtime trace import expert_distribution_recorder_*.pt --from sglang -o routing.npz

docs/formats.md describes the fields of a trace and the columns of a CSV file; docs/placement.md
says how to record with SGLang, TensorRT-LLM, Megatron-Core and vLLM.
"""


class Source(StrEnum):
    """What wrote the files."""

    NPZ = "npz"
    CSV = "csv"
    SGLANG = "sglang"
    TENSORRT_LLM = "tensorrt-llm"
    MEGATRON = "megatron"
    VLLM = "vllm"
    EXFLOW = "exflow"


def import_(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Files to read.")],
    source: Annotated[Source, typer.Option("--from", help="What kind of files they are.")],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="T.npz", help="Write the trace to this file."),
    ],
    num_experts: Annotated[
        int | None,
        typer.Option(min=1, help="Experts a layer, for files that do not say it, or wrongly."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The model's name, for files that do not say it.")
    ] = None,
    domain: Annotated[
        str | None, typer.Option(metavar="LABEL", help="What kind of text it is, such as code.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check files, fill in what they leave out, and write them as one trace."""
    check_writable(output)
    terminal = Terminal(as_json=as_json)
    with terminal.waiting("importing"):
        from moe_runtime.measure.trace_import import import_traces

        result = import_traces(
            files, output, source=source, num_experts=num_experts, model=model, domain=domain
        )
    if result.is_sorted_by_id:
        terminal.warn(
            "the experts of every token are in the order of their ids, so the first is not the one "
            "with the largest weight: solve placements with --objective fanout, and do not read "
            "the crossings of the top-1 path"
        )
    if as_json:
        terminal.show_json(
            {
                "output": str(output),
                "files": result.num_files,
                "tokens": result.num_tokens,
                "sequences": result.num_sequences,
            }
        )
        return
    table = Table(show_header=False)
    table.add_row("trace", str(output))
    table.add_row("files", str(result.num_files))
    table.add_row("tokens", str(result.num_tokens))
    table.add_row("sequences", str(result.num_sequences))
    terminal.show(table)
