"""`moe-runtime predictor trace`: the routing that a predictor expects of prompts, as a trace."""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from moe_runtime.cli.options import (
    OUTPUT_PANEL,
    Chat,
    Json,
    LabelledPrompts,
    Model,
    Revision,
    TrustRemoteCode,
)
from moe_runtime.cli.outputs import check_writable
from moe_runtime.cli.prompts import read_labelled_prompts
from moe_runtime.cli.terminal import Terminal

EPILOG = """Examples:

moe-runtime predictor trace ./model --predictor P.safetensors --prompts F.txt -o predicted.npz
"""


def trace(
    model: Model,
    predictor: Annotated[
        Path, typer.Option(metavar="P.safetensors", help="A file that `predictor train` wrote.")
    ],
    prompts: LabelledPrompts,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="T.npz", help="Write it here.", rich_help_panel=OUTPUT_PANEL
        ),
    ],
    chat: Chat = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Write the trace that prompts would leave, as predicted: the model's layers do not run.

    Only the model's tokenizer and config are read. `placement solve` takes such a trace.
    """
    check_writable(output)
    labelled = read_labelled_prompts(prompts)
    terminal = Terminal(as_json=as_json)
    with terminal.waiting("starting"):
        from moe_runtime.measure.predicted_trace import PredictedPrompts, predict_trace
        from moe_runtime.predictors.store import load_predictor

        loaded = load_predictor(predictor)
        request = PredictedPrompts(
            model=model,
            prompts=[text for text, _ in labelled],
            domains=[label for _, label in labelled],
            revision=revision,
            trust_remote_code=trust_remote_code,
            chat=chat,
        )
        request.check(loaded, str(predictor))
        token_ids = request.token_ids()
    started = time.perf_counter()
    with terminal.progress("prompts") as meter:
        found = predict_trace(loaded, token_ids, request.domains, meter.update)
    seconds = time.perf_counter() - started
    found.save(output)
    if as_json:
        terminal.show_json(
            {
                "output": str(output),
                "predictor": loaded.name,
                "model": found.model,
                "prompts": len(token_ids),
                "rows": found.num_tokens,
                "seconds": seconds,
            }
        )
        return
    table = Table(show_header=False)
    table.add_row("trace", f"{output}, {found.num_tokens} tokens of {len(token_ids)} prompts")
    table.add_row("predicted by", f"{loaded.name}, in {seconds:.2f} s")
    terminal.show(table)
