"""`moe-runtime pack`: a model whose experts take three quarters of the bytes, losslessly."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from moe_runtime.cli.options import Json, Model, Revision, TrustRemoteCode
from moe_runtime.cli.outputs import check_folder
from moe_runtime.cli.terminal import Terminal
from moe_runtime.expert_memory import format_bytes

if TYPE_CHECKING:
    from moe_runtime.memory.packing_report import Packing

EPILOG = """Examples:

moe-runtime pack org/name -o ./name-packed

moe-runtime generate ./name-packed --prompt "def read(" --expert-memory 33%
"""


def pack(
    model: Model,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="Write the packed model here."),
    ],
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Pack the bfloat16 experts of a model, losslessly; DIR is a model for every other command.

    Each file is read back and compared. After an interruption the same command goes on.
    """
    check_folder(output)
    terminal = Terminal(as_json=as_json)
    with terminal.waiting("starting"):
        from moe_runtime.integrations.transformers.pack import pack_model
        from moe_runtime.integrations.transformers.progress import quiet_transformers
    try:
        with (
            quiet_transformers(lambda done, total: None),
            terminal.progress("packing, bytes") as meter,
        ):
            found = pack_model(
                model,
                output.absolute(),
                revision=revision,
                trust_remote_code=trust_remote_code,
                on_progress=meter.update,
            )
    except KeyboardInterrupt:
        terminal.warn("files that are finished are kept; the same command goes on from there")
        raise
    if as_json:
        terminal.show_json(found.as_dict())
    else:
        terminal.show(figures(found))


def figures(found: "Packing") -> Table:
    """Bytes before and after."""
    table = Table(show_header=False)
    table.add_row("folder", str(found.folder))
    table.add_row("model", f"{format_bytes(found.source_bytes)}")
    table.add_row("packed", f"{format_bytes(found.packed_bytes)}")
    if found.expert_share is not None:
        table.add_row(
            "experts",
            f"{format_bytes(found.expert_bytes)} in {found.num_packed} tensors, packed "
            f"{format_bytes(found.packed_expert_bytes)} ({found.expert_share:.2%})",
        )
    if found.num_unpaid:
        table.add_row("left as they are", f"{found.num_unpaid} tensors, where packing does not pay")
    table.add_row("took", f"{found.seconds:.1f} s")
    return table
