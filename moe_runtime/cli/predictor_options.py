"""What the commands of `predictor` share: options, and the facts of a model behind a trace."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_runtime.cli.options import MODEL_PANEL
from moe_runtime.cli.terminal import Terminal

if TYPE_CHECKING:
    from moe_runtime.predictors.predictor import ModelFacts
    from moe_runtime.trace import Trace

TraceFile = Annotated[Path, typer.Argument(metavar="T.npz", help="A routing trace.")]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="The checkpoint that was recorded: its gates, its embedding, its fingerprint.",
        rich_help_panel=MODEL_PANEL,
    ),
]
HeldOut = Annotated[
    float,
    typer.Option(
        "--held-out",
        metavar="SHARE",
        min=0.0,
        max=1.0,
        help="Share of the sequences that is kept for judging; never a part of one.",
    ),
]
SplitSeed = Annotated[
    int, typer.Option("--seed", min=0, help="Which sequences are kept for judging.")
]


def check_names(names: list[str], known: list[str]) -> None:
    """Refuse a name that is no predictor's, with those that are."""
    for name in names:
        if name not in known:
            raise ValueError(
                f"there is no predictor {name!r}; the predictors are {', '.join(known)}"
            )


def facts_of(
    terminal: Terminal,
    model: str | None,
    trace: "Trace",
    revision: str | None,
    trust_remote_code: bool,
) -> "ModelFacts":
    """Of the checkpoint where one is given, else what the trace itself tells."""
    from moe_runtime.predictors.predictor import ModelFacts

    if model is None:
        return ModelFacts.of(trace)
    from moe_runtime.measure.predictor_facts import model_facts

    with terminal.waiting("reading the model"), terminal.warnings_as_remarks():
        return model_facts(model, trace, revision=revision, trust_remote_code=trust_remote_code)
