"""`moe-runtime placement export`: a placement as an engine loads it."""

from pathlib import Path
from typing import Annotated

import typer

from moe_runtime.cli.options import OUTPUT_PANEL, Json
from moe_runtime.cli.outputs import check_writable
from moe_runtime.cli.placement_options import FormatName, PlacementFile
from moe_runtime.cli.terminal import Terminal

EPILOG = """Examples:

moe-runtime placement export placement.json --to sglang -o location.json

moe-runtime placement export placement.json --to tensorrt-llm -o moe_load_balancer.yaml

docs/placement.md says how each engine loads its file.
"""


def export(
    placement: PlacementFile,
    target: Annotated[FormatName, typer.Option("--to", help="Whose file to write.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Write to this file.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ],
    as_json: Json = False,
) -> None:
    """Write a placement as another program reads it, exactly and with nothing added."""
    check_writable(output)
    terminal = Terminal(as_json=as_json)
    with terminal.waiting("writing"):
        from moe_runtime.integrations.placement_formats import FORMATS
        from moe_runtime.placement_map import Placement

        found = Placement.load(placement)
        FORMATS[target].write(found, output)
    if as_json:
        terminal.show_json(
            {
                "output": str(output),
                "format": str(target),
                "gpus": found.gpus,
                "num_slots": found.num_slots,
                "redundant_experts": found.num_slots - found.num_experts,
            }
        )
        return
    terminal.write(
        f"{output}: {found.num_slots} slots a layer on {found.gpus} GPUs, "
        f"{found.num_slots - found.num_experts} of them redundant\n"
    )
