"""`moe-runtime batch`: a file of requests, answered as fast as the machine goes."""

import time
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from moe_runtime.cli.options import (
    MEMORY_PANEL,
    Dtype,
    DtypeOption,
    ExpertDtype,
    ExpertDtypeOption,
    ExpertMemoryOption,
    Json,
    MaxNewTokens,
    Model,
    Revision,
    Temperature,
    TrustRemoteCode,
)
from moe_runtime.cli.outputs import check_writable
from moe_runtime.cli.terminal import Meter, Terminal
from moe_runtime.expert_memory import ExpertMemory, format_bytes

if TYPE_CHECKING:
    from moe_runtime.measure.batch_request import BatchRun
    from moe_runtime.offline.request import BadLine


class TokenGroups(StrEnum):
    """As how many groups the sequences of a pass run; `auto` is what is faster."""

    AUTO = "auto"
    ONE = "1"
    TWO = "2"


EPILOG = """Examples:

moe-runtime batch ./model requests.jsonl -o results.jsonl --expert-memory 35%

A request is one line, of OpenAI's batch format:
{"custom_id": "7", "body": {"prompt": "def read(", "max_tokens": 64, "temperature": 0, "stop": "!"}}

A run that was ended in any way goes on where it was, with the same command.
"""

_REMARK_SECONDS = 30.0  # between lines of a log that nobody watches
_MOST_BAD_LINES = 5  # shown one by one


def batch(
    model: Model,
    requests: Annotated[
        Path,
        typer.Argument(
            metavar="REQUESTS", help="*.jsonl: custom_id, and a body with prompt or messages."
        ),
    ],
    results: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE.jsonl",
            help="Results, appended as lines complete; lines that it has already are skipped.",
        ),
    ],
    max_new_tokens: MaxNewTokens = 64,
    temperature: Temperature = 0.0,
    seed: Annotated[
        int,
        typer.Option(min=0, help="For lines that sample and have no seed of their own."),
    ] = 0,
    expert_memory: ExpertMemoryOption = "auto",
    dense_memory: Annotated[
        str,
        typer.Option(
            metavar="SIZE",
            help="Memory for all other weights: auto (all if they fit), 2GiB, 50%. Layers that do "
            "not fit are read ahead in every pass.",
            rich_help_panel=MEMORY_PANEL,
        ),
    ] = "auto",
    kv_memory: Annotated[
        str,
        typer.Option(
            metavar="SIZE",
            help="Memory for keys and values of the lines that run: auto (what weights leave), "
            "4GiB.",
            rich_help_panel=MEMORY_PANEL,
        ),
    ] = "auto",
    max_sequences: Annotated[
        int,
        typer.Option(min=1, help="At most so many lines at a time.", rich_help_panel=MEMORY_PANEL),
    ] = 512,
    token_groups: Annotated[
        TokenGroups,
        typer.Option(
            help="Two groups of lines take turns: while one attends, the other goes through the "
            "experts. auto tries where attention takes long enough, and keeps what is faster.",
        ),
    ] = TokenGroups.AUTO,
    expert_dtype: ExpertDtypeOption = ExpertDtype.AUTO,
    page_cache: Annotated[
        bool,
        typer.Option(
            "--page-cache",
            help="Read through the system's page cache, which is memory beside the budget.",
            rich_help_panel=MEMORY_PANEL,
        ),
    ] = False,
    dtype: DtypeOption = Dtype.AUTO,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Answer a file of requests on the CPU, each expert read once a layer for all lines together.

    Lines that do not say have --max-new-tokens and --temperature. Every line has the answer that it
    would have alone, as far as rounding does not depend on the batch. A bad line is reported in the
    results, and does not stop the others.
    """
    ExpertMemory.parse(expert_memory)  # before seconds of imports
    check_writable(results)
    terminal = Terminal(as_json=as_json)
    with terminal.waiting("starting"):
        from moe_runtime.measure.batch_request import BatchRequest
        from moe_runtime.measure.batch_run import run_batch
    request = BatchRequest(
        model=model,
        requests=requests,
        results=results,
        max_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        expert_memory=expert_memory,
        dense_memory=dense_memory,
        kv_memory=kv_memory,
        max_sequences=max_sequences,
        token_groups=token_groups,
        expert_dtype=expert_dtype,
        page_cache=page_cache,
        dtype=dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    with terminal.progress("loading") as meter, terminal.warnings_as_remarks():
        listener = _Listener(terminal, meter)
        run = run_batch(request, listener)
    listener.close()
    if as_json:
        terminal.show_json(run.as_dict() | {"output": str(results)})
    else:
        terminal.show(_table(run, results))


class _Listener:
    """Shows on stderr what happens."""

    def __init__(self, terminal: Terminal, meter: Meter) -> None:
        self._terminal = terminal
        self._meter = meter
        self._num_bad = 0
        self._remarked_at = time.monotonic()

    def on_loading(self, done: int, total: int) -> None:
        self._meter.update(done, total)

    def on_loaded(self, placement: str) -> None:
        self._terminal.remark(placement)

    def on_bad_line(self, bad: "BadLine") -> None:
        self._num_bad += 1
        if self._num_bad <= _MOST_BAD_LINES:
            self._terminal.warn(f"line {bad.line}: {bad.message}")

    def on_warning(self, sentence: str) -> None:
        self._terminal.warn(sentence)

    def on_lines(self, done: int, total: int, eta_seconds: float) -> None:
        left = f"at most {timedelta(seconds=round(eta_seconds))} left"
        self._meter.say(left)
        self._meter.update(done, total)
        now = time.monotonic()
        if not self._meter.is_seen and now - self._remarked_at >= _REMARK_SECONDS:
            self._remarked_at = now
            self._terminal.remark(f"{done} of {total} lines, {left}")

    def close(self) -> None:
        if self._num_bad > _MOST_BAD_LINES:
            self._terminal.warn(
                f"{self._num_bad - _MOST_BAD_LINES} more lines cannot run; the results say why"
            )


def _table(run: "BatchRun", results: Path) -> Table:
    table = Table(title=f"{results}", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("lines", f"{run.num_lines}")
    table.add_row("finished now", f"{run.num_finished}")
    table.add_row("finished before", f"{run.num_skipped}")
    table.add_row("cannot run", f"{run.num_failed}")
    if run.report is not None:
        passes, kv = run.report["passes"], run.report["kv"]
        table.add_row("new tokens", f"{run.new_tokens}")
        if run.new_tokens_per_second is not None:
            table.add_row("new tokens a second", f"{run.new_tokens_per_second:.1f}")
        table.add_row("passes", f"{passes['passes']}")
        table.add_row("lines at a time, at most", f"{passes['most_sequences']}")
        table.add_row("weight bytes read", format_bytes(passes["read_bytes"]))
        table.add_row("experts read in a pass, at most", f"{passes['most_pass_experts_loaded']}")
        table.add_row("keys and values, at most", format_bytes(kv["most_used_bytes"]))
        table.add_row("attention", str(kv["attention"]))
        table.add_row("groups of lines", _groups(run.report["token_groups"]))
    return table


def _groups(found: dict[str, Any]) -> str:
    """What was kept, and the two figures that it was chosen by."""
    if found["refusal"] is not None:
        return f"one: {found['refusal']}"
    one, two = found["one_token_seconds"], found["two_token_seconds"]
    kept = "two, in turns" if found["groups"] == 2 else "one"
    if one is None or two is None:
        return kept
    return f"{kept} ({1e3 * one:.3g} ms a token in one, {1e3 * two:.3g} in two)"
