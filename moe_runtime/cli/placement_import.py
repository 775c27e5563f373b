"""`moe-runtime placement import`: another program's placement as one of ours."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_runtime.cli.options import Json
from moe_runtime.cli.outputs import check_writable
from moe_runtime.cli.placement_options import (
    CLUSTER_PANEL,
    DATA_PANEL,
    FormatName,
    NumExperts,
    PlacementOutput,
)
from moe_runtime.cli.terminal import Terminal

if TYPE_CHECKING:
    from moe_runtime.placement_map import Placement
    from moe_runtime.trace import Trace

EPILOG = """Examples:

moe-runtime placement import location.json --from sglang --gpus 8 --like T.npz -o placement.json

moe-runtime placement import solution.csv --from exflow --num-experts 8 -o placement.json

moe-runtime placement import maps.pt --from eplb --gpus 32 --nodes 4 -o placement.json
"""


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", show_default=False)],
    source: Annotated[FormatName, typer.Option("--from", help="Whose file it is.")],
    output: PlacementOutput,
    gpus: Annotated[
        int | None,
        typer.Option(
            min=1, help="GPUs, where the file does not say it.", rich_help_panel=CLUSTER_PANEL
        ),
    ] = None,
    nodes: Annotated[
        int, typer.Option(min=1, help="Nodes that share them.", rich_help_panel=CLUSTER_PANEL)
    ] = 1,
    like: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A trace or placement of the same model: its name, layers and experts.",
            rich_help_panel=DATA_PANEL,
        ),
    ] = None,
    num_experts: NumExperts = None,
    as_json: Json = False,
) -> None:
    """Read a placement of another program, check it, and write it as placement.json."""
    check_writable(output)
    terminal = Terminal(as_json=as_json)
    with terminal.waiting("reading"):
        from moe_runtime.integrations.placement_formats import FORMATS
        from moe_runtime.integrations.placement_hints import PlacementHints

        known = None if like is None else _load_like(like)
        hints = PlacementHints(
            model=None if known is None else known.model,
            checkpoint="" if known is None else known.checkpoint,
            num_experts=num_experts or (None if known is None else known.num_experts),
            layer_ids=None if known is None else known.layer_ids,
            num_hidden_layers=None if known is None else known.num_hidden_layers,
            gpus=gpus,
            nodes=nodes,
        )
        found = FORMATS[source].read(file, hints)
        found.save(output)
    twice = found.duplicate()
    if twice is not None:
        layer, gpu, expert = twice
        terminal.warn(
            f"slots[{layer}] has expert {expert} twice on GPU {gpu}: the second is of no use, and "
            "some engines refuse it"
        )
    if as_json:
        terminal.show_json(
            {
                "output": str(output),
                "model": found.model,
                "num_experts": found.num_experts,
                "num_layers": found.num_layers,
                "gpus": found.gpus,
                "nodes": found.nodes,
                "num_slots": found.num_slots,
                "has_duplicates": twice is not None,
            }
        )
        return
    terminal.write(
        f"{output}: {found.num_layers} layers of {found.num_experts} experts in "
        f"{found.num_slots} slots on {found.gpus} GPUs\n"
    )


def _load_like(file: Path) -> "Trace | Placement":
    from moe_runtime.placement_map import Placement
    from moe_runtime.trace import Trace

    if file.suffix == ".npz":
        return Trace.load(file, leave_out=("weights", "gate_probs", "hidden"))
    return Placement.load(file)
