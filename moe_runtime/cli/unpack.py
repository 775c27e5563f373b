"""`moe-runtime unpack`: the model that a packed folder was made of, byte for byte."""

from pathlib import Path
from typing import Annotated

import typer

from moe_runtime.cli.options import Json
from moe_runtime.cli.outputs import check_folder
from moe_runtime.cli.pack import figures
from moe_runtime.cli.terminal import Terminal

EPILOG = """Example:

moe-runtime unpack ./name-packed -o ./name
"""


def unpack(
    packed: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder that moe-runtime pack has written.")
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR2", help="Write the unpacked model here."),
    ],
    as_json: Json = False,
) -> None:
    """Restore every file of the source of a packed folder, checked by its SHA-256."""
    check_folder(output)
    terminal = Terminal(as_json=as_json)
    with terminal.waiting("starting"):
        from moe_runtime.memory.unpack_folder import unpack_folder
    with terminal.progress("unpacking, bytes") as meter:
        found = unpack_folder(packed, output.absolute(), on_progress=meter.update)
    if as_json:
        terminal.show_json(found.as_dict())
    else:
        terminal.show(figures(found))
