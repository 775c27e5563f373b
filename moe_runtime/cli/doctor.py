"""`moe-runtime doctor`: what this machine offers, and what stands in the way."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_runtime.measure.check import Status
from moe_runtime.measure.doctor import Diagnosis, diagnose

_COLOURS = {Status.OK: "green", Status.WARN: "yellow", Status.FAIL: "red"}


def doctor(
    path: Annotated[
        Path, typer.Option("--path", help="The folder that holds, or will hold, the model.")
    ] = Path(),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and nothing else.")
    ] = False,
) -> None:
    """Check this machine: versions, CPU, memory, disk, GPU. Exits with 1 if a check fails."""
    if as_json:
        diagnosis = diagnose(path.absolute())
        typer.echo(json.dumps(diagnosis.as_dict(), indent=2))
    else:
        console = Console()
        with console.status("reading from the disk for two seconds"):
            diagnosis = diagnose(path.absolute())
        console.print(_table(diagnosis))
    if diagnosis.status is Status.FAIL:
        raise typer.Exit(1)


def _table(diagnosis: Diagnosis) -> Table:
    table = Table("check", "status", "finding", "remedy", title="moe-runtime doctor")
    for check in diagnosis.checks:
        status = Text(check.status, style=_COLOURS[check.status])
        table.add_row(check.name, status, Text(check.finding), Text(check.remedy))
    return table
