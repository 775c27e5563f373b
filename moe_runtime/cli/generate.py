"""`moe-runtime generate`: text from a model whose experts do not fit in memory."""

import random
from pathlib import Path
from typing import Annotated

import typer

from moe_runtime.cli.options import (
    MEMORY_PANEL,
    MODEL_PANEL,
    OUTPUT_PANEL,
    RANKS_PANEL,
    TEXT_PANEL,
    AttentionOption,
    Chat,
    DeviceOption,
    DispatchOption,
    Dtype,
    DtypeOption,
    ExpertDtype,
    ExpertDtypeOption,
    ExpertMemoryOption,
    ExpertSlots,
    ExpertSlotsOption,
    HostMemoryOption,
    Json,
    MaxNewTokens,
    MigrateAfter,
    MigrateOption,
    Miss,
    MissOption,
    Model,
    Payload,
    PayloadOption,
    PipelineOption,
    PlanChoice,
    PlanOption,
    Policy,
    PolicyOption,
    PredictorOption,
    Revision,
    Seed,
    TablesOption,
    Temperature,
    TimeoutSeconds,
    TrustRemoteCode,
)
from moe_runtime.cli.outputs import check_writable
from moe_runtime.cli.prompts import read_prompts
from moe_runtime.cli.terminal import Terminal
from moe_runtime.errors import BudgetError, ParallelError
from moe_runtime.expert_memory import ExpertMemory

EPILOG = """Examples:

moe-runtime generate ./model --prompt "def read(" --expert-memory 33%

moe-runtime generate ./model --prompt "def read(" --plan auto

moe-runtime generate org/name --prompts questions.jsonl --chat --temperature 0.7 --json

moe-runtime generate ./model --prompt "def read(" --report run.html --hardware machine.yaml

torchrun --nproc-per-node 4 -m moe_runtime generate ./model --dispatch auto --prompts FILE --json

torchrun --nproc-per-node 4 -m moe_runtime generate M --placement P.json --tables T.npz --prompts F

torchrun --nproc-per-node 4 -m moe_runtime generate M --dispatch auto --migrate Q.json --prompts F
"""


def generate(
    context: typer.Context,
    model: Model,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to continue. May be given several times.")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help='One prompt a line, or *.jsonl with {"prompt": ...} lines; - is standard input.',
        ),
    ] = None,
    max_new_tokens: MaxNewTokens = 64,
    temperature: Temperature = 0.0,
    top_p: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Sample from this share of probability.",
            rich_help_panel=TEXT_PANEL,
        ),
    ] = None,
    seed: Seed = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            help="End after this text, which stays. May be given several times.",
            rich_help_panel=TEXT_PANEL,
        ),
    ] = None,
    chat: Chat = False,
    expert_memory: ExpertMemoryOption = "auto",
    host_memory: HostMemoryOption = "auto",
    miss: MissOption = Miss.AUTO,
    policy: PolicyOption = Policy.LRU,
    predictor: PredictorOption = "off",
    warm_start: Annotated[
        bool,
        typer.Option(
            "--warm-start/--no-warm-start",
            help="Read first what was hot when this model was closed last, and keep that again.",
            rich_help_panel=MEMORY_PANEL,
        ),
    ] = True,
    expert_slots: ExpertSlotsOption = ExpertSlots.AUTO,
    expert_dtype: ExpertDtypeOption = ExpertDtype.AUTO,
    page_cache: Annotated[
        bool,
        typer.Option(
            "--page-cache",
            help="Read through the system's page cache, which is memory beside the budget.",
            rich_help_panel=MEMORY_PANEL,
        ),
    ] = False,
    max_memory: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DEVICE=SIZE",
            help="Limit for dense weights and experts together, such as cpu=30GiB or 0=10GiB.",
            rich_help_panel=MEMORY_PANEL,
        ),
    ] = None,
    plan: PlanOption = PlanChoice.OFF,
    dtype: DtypeOption = Dtype.AUTO,
    device: DeviceOption = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact",
            help="Compute as the unmodified model does, bit for bit, at some cost in speed.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = False,
    linears: Annotated[
        bool,
        typer.Option(
            "--linears",
            help="Let the experts' kernel compute the other linear layers too, in decoding.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Run the unmodified model too, which needs memory for all experts, and compare.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN.html",
            help="Record the run, and write a page of it: time, lanes, cache and bytes.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = None,
    hardware: Annotated[
        Path | None,
        typer.Option(
            metavar="MACHINE.yaml",
            help="With --report: what the rates of this file, as `probe` writes it, would take.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = None,
    placement: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Which rank holds which expert, as `placement solve` writes it; without it, equal "
            "parts in the order of their numbers.",
            rich_help_panel=RANKS_PANEL,
        ),
    ] = None,
    dispatch: DispatchOption = None,
    payload: PayloadOption = Payload.EXACT,
    pipeline: PipelineOption = "1",
    attention: AttentionOption = None,
    tables: TablesOption = None,
    migrate: MigrateOption = None,
    migrate_after: MigrateAfter = 0,
    timeout_seconds: TimeoutSeconds = None,
    as_json: Json = False,
) -> None:
    """Continue prompts, one after the other, with experts read from disk into a bounded cache."""
    texts = read_prompts(prompt or [], prompts)
    ExpertMemory.parse(expert_memory)  # before seconds of imports
    limits = _parse_limits(max_memory or [])
    if report is not None:
        check_writable(report)
    elif hardware is not None:
        raise ValueError(f"--hardware {hardware} predicts for a page; add --report RUN.html")
    terminal = Terminal(as_json=as_json)
    with terminal.waiting("starting"):
        from moe_runtime.cli.generate_parallel import generate_on_ranks_and_show
        from moe_runtime.cli.generation_view import generate_and_show
        from moe_runtime.measure.decoding import Decoding
        from moe_runtime.measure.generation_request import GenerationRequest
        from moe_runtime.parallel.world import started_ranks
    request = GenerationRequest(
        model=model,
        prompts=texts,
        decoding=Decoding(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=random.randrange(2**32) if seed is None else seed,
            stop=tuple(stop or ()),
        ),
        expert_memory=expert_memory,
        host_memory=host_memory,
        miss=miss,
        policy=policy,
        predictor=predictor,
        warm_start=warm_start,
        expert_slots=expert_slots,
        expert_dtype=expert_dtype,
        page_cache=page_cache,
        exact=exact,
        linears=linears,
        max_memory=limits,
        dtype=dtype,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
        chat=chat,
        check=check,
        placement=None if placement is None else str(placement),
        dispatch=dispatch,
        payload=payload,
        pipeline=int(pipeline) if pipeline.isdigit() else pipeline,
        attention=attention,
        tables=None if tables is None else str(tables),
        migrate=None if migrate is None else str(migrate),
        migrate_after=migrate_after,
        timeout_seconds=timeout_seconds,
        plan=plan,
        explicit=_given(context),
        report=None if report is None else str(report),
        hardware=None if hardware is None else str(hardware),
    )
    if migrate is None and migrate_after:
        raise ParallelError(
            f"--migrate-after {migrate_after} has no effect alone; name a placement with --migrate"
        )
    if migrate is not None and not request.is_parallel:
        raise ParallelError(
            f"--migrate {migrate} has no effect on one process; start ranks with torchrun and "
            "--dispatch or --placement"
        )
    if request.is_parallel:
        if report is not None:
            raise ParallelError(
                f"--report {report} shows one process, and --placement or --dispatch share the "
                "run among ranks; leave out one of them"
            )
        generate_on_ranks_and_show(request, terminal)
        return
    num_started = started_ranks() or 1
    if num_started > 1:
        raise ParallelError(
            f"torchrun started {num_started} ranks, and each would run every prompt on the whole "
            "model; share the experts with --dispatch auto or --placement FILE, or start one rank"
        )
    generate_and_show(request, terminal)


def _given(context: typer.Context) -> tuple[str, ...]:
    """Names of the options that stand on the command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return tuple(
        name for name, source in sources.items() if source is not None and source.name != "DEFAULT"
    )


def _parse_limits(written: list[str]) -> dict[int | str, int | str] | None:
    """`cpu=30GiB` and `0=10GiB` as Hugging Face's max_memory."""
    limits: dict[int | str, int | str] = {}
    for text in written:
        device, _, size = (part.strip() for part in text.partition("="))
        try:
            is_size = ExpertMemory.parse(size).num_bytes is not None
        except BudgetError:
            is_size = False
        if not device or not is_size:
            raise BudgetError(f"--max-memory {text!r} is not DEVICE=SIZE; write cpu=30GiB")
        limits[int(device) if device.isdigit() else device] = size
    return limits or None
