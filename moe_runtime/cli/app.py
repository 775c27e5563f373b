"""The program `moe-runtime`: its commands, and how each of them ends."""

import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from moe_runtime import __version__
from moe_runtime.cli.terminal import Terminal
from moe_runtime.errors import MoERuntimeError

_PACKAGE = Path(__file__).resolve().parents[1]
_TRACEBACK_VARIABLE = "MOE_RUNTIME_TRACEBACK"
_INTERRUPTED = 130  # 128 + SIGINT, as shells count
# The name of this class depends on the version of typer, which carries its own click.
_USAGE_ERROR: type[Any] = typer.BadParameter.__mro__[1]

_EPILOG = """Examples:

moe-runtime demo

moe-runtime inspect ./model

moe-runtime generate ./model --prompt "def read(" --expert-memory 33% --check
"""


@dataclass(frozen=True, slots=True)
class LazyCommand:
    """A command whose module is imported when it runs."""

    module: str
    attribute: str
    summary: str


@dataclass(frozen=True, slots=True)
class CommandFamily:
    """Commands that share their first word."""

    summary: str
    commands: Mapping[str, LazyCommand]


COMMANDS: Mapping[str, LazyCommand | CommandFamily] = {
    "demo": LazyCommand("moe_runtime.cli.demo", "demo", "Run the bundled model and check it."),
    "inspect": LazyCommand(
        "moe_runtime.cli.inspect", "inspect", "Show what a checkpoint is and needs."
    ),
    "plan": LazyCommand(
        "moe_runtime.cli.plan", "plan", "Choose settings for a model and a machine."
    ),
    "generate": LazyCommand(
        "moe_runtime.cli.generate", "generate", "Continue prompts within a memory budget."
    ),
    "batch": LazyCommand(
        "moe_runtime.cli.batch", "batch", "Answer a file of requests, as fast as it goes."
    ),
    "pack": LazyCommand(
        "moe_runtime.cli.pack", "pack", "Make a model's experts a quarter smaller, losslessly."
    ),
    "unpack": LazyCommand("moe_runtime.cli.unpack", "unpack", "Restore a packed model."),
    "doctor": LazyCommand("moe_runtime.cli.doctor", "doctor", "Check this machine."),
    "profile": LazyCommand(
        "moe_runtime.cli.profile", "profile", "Show where the time of a decode step goes."
    ),
    "probe": LazyCommand("moe_runtime.cli.probe", "probe", "Measure this machine's rates."),
    "trace": CommandFamily(
        "Record routing, and look at it.",
        {
            "record": LazyCommand(
                "moe_runtime.cli.trace_record", "record", "Record which experts prompts use."
            ),
            "info": LazyCommand(
                "moe_runtime.cli.trace_info", "info", "Show load, reuse and dependence of layers."
            ),
            "import": LazyCommand(
                "moe_runtime.cli.trace_import", "import_", "Turn other files into a trace."
            ),
        },
    ),
    "cache": CommandFamily(
        "Study expert caches.",
        {
            "simulate": LazyCommand(
                "moe_runtime.cli.cache_simulate",
                "simulate",
                "Replay a trace through cache policies.",
            ),
        },
    ),
    "placement": CommandFamily(
        "Decide which GPU holds which expert.",
        {
            "solve": LazyCommand(
                "moe_runtime.cli.placement_solve", "solve", "Place experts by recorded routing."
            ),
            "evaluate": LazyCommand(
                "moe_runtime.cli.placement_evaluate", "evaluate", "Judge a placement on a trace."
            ),
            "compare": LazyCommand(
                "moe_runtime.cli.placement_compare", "compare", "Judge ours beside the usual ones."
            ),
            "export": LazyCommand(
                "moe_runtime.cli.placement_export", "export", "Write it as an engine loads it."
            ),
            "import": LazyCommand(
                "moe_runtime.cli.placement_import", "import_", "Read another program's placement."
            ),
        },
    ),
    "predictor": CommandFamily(
        "Predict routing, and see how far that can be trusted.",
        {
            "list": LazyCommand("moe_runtime.cli.predictor_list", "list_", "List the predictors."),
            "train": LazyCommand(
                "moe_runtime.cli.predictor_train", "train", "Fit a predictor to a trace."
            ),
            "eval": LazyCommand(
                "moe_runtime.cli.predictor_eval", "eval_", "Judge predictors on unseen sequences."
            ),
            "trace": LazyCommand(
                "moe_runtime.cli.predictor_trace", "trace", "Write the routing that is expected."
            ),
        },
    ),
    "bench": CommandFamily(
        "Measure speed against peers and against the machine's limits.",
        {
            "offload": LazyCommand(
                "moe_runtime.cli.bench_offload", "offload", "Decode with experts on disk."
            ),
            "kernels": LazyCommand(
                "moe_runtime.cli.bench_kernels", "kernels", "Compute experts in memory."
            ),
            "parallel": LazyCommand(
                "moe_runtime.cli.bench_parallel", "parallel", "Count bytes between ranks."
            ),
        },
    ),
}


class LazyGroup(TyperGroup):
    """Lists commands from a table; imports one only to run it or to show its own help."""

    table: Mapping[str, LazyCommand | CommandFamily] = COMMANDS

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.table)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        entry = self.table.get(cmd_name)
        return None if entry is None else TyperCommand(cmd_name, help=entry.summary)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, _, rest = super().resolve_command(ctx, args)
        entry = self.table[str(name)]
        if isinstance(entry, LazyCommand):
            return name, _load_command(str(name), entry), rest
        return name, _family_group(str(name), entry), rest or ["--help"]


def _load_command(name: str, lazy: LazyCommand) -> Any:
    module = import_module(lazy.module)
    alone = typer.Typer(add_completion=False)
    alone.command(name, epilog=getattr(module, "EPILOG", None))(getattr(module, lazy.attribute))
    return typer.main.get_command(alone)


def _family_group(name: str, family: CommandFamily) -> Any:
    group = LazyGroup(name=name, help=family.summary, rich_markup_mode="rich")
    group.table = family.commands
    return group


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"moe-runtime {__version__}")
        raise typer.Exit


app = typer.Typer(cls=LazyGroup, add_completion=False, rich_markup_mode="rich")


@app.callback(epilog=_EPILOG)
def moe_runtime(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Show the version."
    ),
) -> None:
    """Run Mixture-of-Experts models whose experts do not fit in memory."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Whatever goes wrong is one sentence on stderr."""
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        with typer.main.get_command(app).make_context("moe-runtime", words) as context:
            context.command.invoke(context)
    except typer.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        Terminal().remark("interrupted")
        return _INTERRUPTED
    except BrokenPipeError:  # whoever read our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get(_TRACEBACK_VARIABLE):
            raise
        Terminal().fail(_sentence(error))
        return 2 if isinstance(error, _USAGE_ERROR) else 1
    return 0


def _sentence(error: Exception) -> str:
    """What went wrong, for a person: our own words as they are, others' with their type."""
    if isinstance(error, _USAGE_ERROR):
        context = getattr(error, "ctx", None)
        where = context.command_path if context is not None else "moe-runtime"
        said = error.format_message().removeprefix("Invalid value: ").replace("Value error, ", "")
        return f"{said.rstrip('.')}; see {where} --help"
    if isinstance(error, MoERuntimeError):
        return str(error)
    if isinstance(error, ValueError | TypeError) and _is_raised_here(error):
        return str(error)
    return (
        f"unexpected {type(error).__name__}: {str(error) or 'no message'} "
        f"(set {_TRACEBACK_VARIABLE}=1 to see where)"
    )


def _is_raised_here(error: Exception) -> bool:
    """Whether one of our files raised it, on purpose then; not a library that we called."""
    last = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    # In a checkout the rooms beside the package are linked into it.
    folders = (_PACKAGE, *(path.resolve() for path in _PACKAGE.iterdir() if path.is_symlink()))
    return any(folder in last.parents for folder in folders)
