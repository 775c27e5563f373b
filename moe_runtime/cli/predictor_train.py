"""`moe-runtime predictor train`: fits a predictor of routing, as a file."""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from moe_runtime.cli.options import Json, Revision, TrustRemoteCode
from moe_runtime.cli.outputs import check_writable
from moe_runtime.cli.predictor_options import (
    HeldOut,
    ModelOption,
    SplitSeed,
    TraceFile,
    check_names,
    facts_of,
)
from moe_runtime.cli.terminal import Terminal
from moe_runtime.expert_memory import format_bytes

EPILOG = """Examples:

moe-runtime predictor train T.npz --predictor markov -o markov.safetensors

moe-runtime predictor train T.npz --predictor gate_lookahead --model ./model -o gates.safetensors
"""


def train(
    trace: TraceFile,
    predictor: Annotated[
        str, typer.Option(metavar="NAME", help="One of those that `predictor list` shows.")
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="P.safetensors", help="Write it to this file."),
    ],
    model: ModelOption = None,
    held_out: HeldOut = 0.2,
    seed: SplitSeed = 0,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Fit a predictor to the sequences of a trace that are not held out."""
    check_writable(output)
    terminal = Terminal(as_json=as_json)
    with terminal.waiting("reading the trace"):
        from moe_runtime.predictors.registry import PREDICTORS
        from moe_runtime.predictors.split import Split, split_by_sequence
        from moe_runtime.predictors.store import save_predictor
        from moe_runtime.trace import Trace

        check_names([predictor], list(PREDICTORS))
        kind = PREDICTORS[predictor]
        loaded = Trace.load(trace, leave_out=() if model else ("hidden",))
        split = Split(held_out=held_out, seed=seed)
        to_fit, _ = split_by_sequence(loaded, split)
    facts = facts_of(terminal, model, loaded, revision, trust_remote_code)
    started = time.perf_counter()
    with terminal.progress(f"fitting {predictor}") as meter:
        fitted = kind.fit(to_fit, facts, meter.update)
    seconds = time.perf_counter() - started
    size = save_predictor(fitted, output, split)
    if as_json:
        terminal.show_json(
            {
                "output": str(output),
                "predictor": predictor,
                "fingerprint": str(facts.fingerprint),
                "tokens": to_fit.num_tokens,
                "held_out": held_out,
                "seed": seed,
                "seconds": seconds,
                "bytes": size,
            }
        )
        return
    table = Table(show_header=False)
    table.add_row("predictor", f"{output}, {predictor}, {format_bytes(size)}")
    table.add_row("of", str(facts.fingerprint))
    table.add_row("fitted to", f"{to_fit.num_tokens} of {loaded.num_tokens} tokens")
    table.add_row("took", f"{seconds:.1f} s")
    terminal.show(table)
