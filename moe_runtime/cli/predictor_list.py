"""`moe-runtime predictor list`: which predictors there are, and what each one looks at."""

from typing import Any

from rich.table import Table

from moe_runtime.cli.options import Json
from moe_runtime.cli.terminal import Terminal

EPILOG = """Examples:

moe-runtime predictor list --json
"""

_ALWAYS = "topk"


def list_(as_json: Json = False) -> None:
    """List the predictors of routing: what a trace must hold for each, and what each one is."""
    terminal = Terminal(as_json=as_json)
    with terminal.waiting("starting"):
        from moe_runtime.predictors.registry import PREDICTORS

        found: list[dict[str, Any]] = [
            {
                "predictor": name,
                "needs": [_ALWAYS, *sorted(kind.needs)],
                "needs_model": "hidden" in kind.needs,
                "what": " ".join((kind.__doc__ or "").split("\n\n")[0].split()),
            }
            for name, kind in PREDICTORS.items()
        ]
    if as_json:
        terminal.show_json({"predictors": found})
        return
    table = Table("predictor", "trace fields", "checkpoint", "what it is")
    for one in found:
        is_needed = "its gates" if one["needs_model"] else "-"
        fields = ", ".join(str(field) for field in one["needs"])
        table.add_row(str(one["predictor"]), fields, is_needed, str(one["what"]))
    terminal.show(table)
