"""`moe-runtime trace record`: which experts a model uses on prompts, as a file."""

import random
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from moe_runtime.cli.loading_view import LoadingView
from moe_runtime.cli.options import (
    OUTPUT_PANEL,
    TEXT_PANEL,
    Chat,
    Dtype,
    DtypeOption,
    ExpertMemoryOption,
    Json,
    LabelledPrompts,
    MaxNewTokens,
    Model,
    Policy,
    PolicyOption,
    Revision,
    Seed,
    Temperature,
    TrustRemoteCode,
)
from moe_runtime.cli.outputs import check_writable
from moe_runtime.cli.prompts import read_labelled_prompts
from moe_runtime.cli.terminal import Terminal
from moe_runtime.expert_memory import ExpertMemory, format_bytes

if TYPE_CHECKING:
    from moe_runtime.measure.trace_recording import Recording

EPILOG = """Examples:

moe-runtime trace record ./model --prompts questions.txt -o routing.npz

moe-runtime trace record org/name --prompts mixed.jsonl --expert-memory 8GiB --hidden -o t.npz
"""


def record(
    model: Model,
    prompts: LabelledPrompts,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="T.npz", help="Write the trace to this file."),
    ],
    hidden: Annotated[
        bool,
        typer.Option(
            "--hidden",
            help="Keep what each router saw too, in float16: large.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = False,
    domain: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Label of prompts that carry none.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = "",
    batch_size: Annotated[
        int,
        typer.Option(min=1, help="Run so many prompts together.", rich_help_panel=TEXT_PANEL),
    ] = 1,
    max_new_tokens: MaxNewTokens = 64,
    temperature: Temperature = 0.0,
    seed: Seed = None,
    chat: Chat = False,
    expert_memory: ExpertMemoryOption = "auto",
    policy: PolicyOption = Policy.LRU,
    dtype: DtypeOption = Dtype.AUTO,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Run prompts and write down which experts every token uses, prompt and continuation alike.

    An interrupted recording is kept as T.partial.npz.
    """
    labelled = read_labelled_prompts(prompts)
    check_writable(output)
    ExpertMemory.parse(expert_memory)  # before seconds of imports
    terminal = Terminal(as_json=as_json)
    with terminal.waiting("starting"):
        from moe_runtime.measure.decoding import Decoding
        from moe_runtime.measure.trace_recording import RecordingRequest, record_trace
    request = RecordingRequest(
        model=model,
        prompts=[text for text, _ in labelled],
        domains=[label or domain for _, label in labelled],
        output=output,
        decoding=Decoding(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=random.randrange(2**32) if seed is None else seed,
        ),
        batch_size=batch_size,
        hidden=hidden,
        expert_memory=expert_memory,
        policy=policy,
        dtype=dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
        chat=chat,
    )
    with terminal.warnings_as_remarks(), ExitStack() as on_screen:
        recording = record_trace(request, _View(terminal, on_screen))
    if as_json:
        terminal.show_json(recording.as_dict())
    else:
        terminal.show(_figures(recording))


class _View(LoadingView):
    def on_prompts(self, done: int, total: int) -> None:
        self.show_progress("prompts", done, total)

    def on_cut_short(self, kept: Path, num_tokens: int) -> None:
        self.clear()
        self.terminal.warn(f"the {num_tokens} tokens recorded so far are kept in {kept}")


def _figures(recording: "Recording") -> Table:
    cache = recording.cache
    table = Table(show_header=False)
    table.add_row("trace", f"{recording.output}, {format_bytes(recording.output.stat().st_size)}")
    table.add_row("recorded", f"{recording.num_rows} tokens of {recording.num_prompts} prompts")
    table.add_row("took", f"{recording.seconds:.1f} s")
    table.add_row(
        "expert cache",
        f"{cache['hit_rate']:.1%} hits ({cache['policy']}, {cache['slots']} slots of "
        f"{format_bytes(cache['slot_bytes'])})",
    )
    return table
