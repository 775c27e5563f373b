"""Arguments and options that several commands share."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

MODEL_PANEL = "Model"
MEMORY_PANEL = "Memory"
TEXT_PANEL = "Text"
OUTPUT_PANEL = "Output"
RANKS_PANEL = "Several ranks, under torchrun"


class Dtype(StrEnum):
    """In which numbers the model computes; `auto` is what its config says."""

    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class Policy(StrEnum):
    """Which expert leaves the cache."""

    LRU = "lru"
    LFU = "lfu"
    PLEC = "plec"


class ExpertSlots(StrEnum):
    """What expert slots hold, where the checkpoint is packed."""

    AUTO = "auto"
    PACKED = "packed"
    UNPACKED = "unpacked"


class ExpertDtype(StrEnum):
    """What experts are rounded to when they are read; `auto` is not at all."""

    AUTO = "auto"
    INT8 = "int8"
    INT4 = "int4"


class PlanChoice(StrEnum):
    """Whether settings are chosen for this machine."""

    OFF = "off"
    AUTO = "auto"


class Miss(StrEnum):
    """How experts that the GPU lacks are computed."""

    AUTO = "auto"
    COPY = "copy"
    CPU = "cpu"


class Dispatch(StrEnum):
    """What moves tokens between ranks."""

    AUTO = "auto"
    ALLTOALL = "alltoall"
    ALLREDUCE = "allreduce"
    HIERARCHICAL = "hierarchical"
    COHERENT = "coherent"
    SPECULATIVE = "speculative"


class Payload(StrEnum):
    """In which numbers hidden states travel between ranks; `exact` is the model's own."""

    EXACT = "exact"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"


class Attention(StrEnum):
    """How ranks share attention."""

    DATA = "data"
    TENSOR = "tensor"


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder, or a hub id such as org/name.")
]
Json = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print one JSON object and nothing else on stdout.",
        rich_help_panel=OUTPUT_PANEL,
    ),
]
DtypeOption = Annotated[
    Dtype,
    typer.Option(
        help="Compute in this dtype; auto is the checkpoint's.", rich_help_panel=MODEL_PANEL
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit of a hub id.", rich_help_panel=MODEL_PANEL),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that comes with the model. Only if you trust it.",
        rich_help_panel=MODEL_PANEL,
    ),
]
MaxNewTokens = Annotated[
    int,
    typer.Option(min=1, help="At most so many tokens a prompt.", rich_help_panel=TEXT_PANEL),
]
Temperature = Annotated[
    float, typer.Option(min=0.0, help="0 is greedy.", rich_help_panel=TEXT_PANEL)
]
Seed = Annotated[
    int | None,
    typer.Option(min=0, help="Makes sampling repeatable.", rich_help_panel=TEXT_PANEL),
]
LabelledPrompts = Annotated[
    str,
    typer.Option(
        "--prompts",
        metavar="FILE",
        help='One prompt a line, or *.jsonl with {"prompt": ..., "domain": ...} lines; '
        "- is standard input.",
    ),
]

Chat = Annotated[
    bool,
    typer.Option(
        "--chat", help="Wrap prompts in the model's chat template.", rich_help_panel=TEXT_PANEL
    ),
]
ExpertMemoryOption = Annotated[
    str,
    typer.Option(
        metavar="SIZE",
        help="Memory for experts: auto (all if they fit, else what is free), 512MiB, 33%.",
        rich_help_panel=MEMORY_PANEL,
    ),
]
HostMemoryOption = Annotated[
    str,
    typer.Option(
        metavar="SIZE",
        help="With a GPU: pinned host memory for experts behind it, written as --expert-memory.",
        rich_help_panel=MEMORY_PANEL,
    ),
]
MissOption = Annotated[
    Miss,
    typer.Option(
        help="With a GPU: copy an expert that it lacks, compute it on the CPU, or what is faster.",
        rich_help_panel=MEMORY_PANEL,
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(help="cpu, cuda or cuda:0; a GPU if there is one.", rich_help_panel=MODEL_PANEL),
]
PolicyOption = Annotated[
    Policy,
    typer.Option(
        help="Which expert makes room: the least recently or least frequently used, or the one "
        "expected back last.",
        rich_help_panel=MEMORY_PANEL,
    ),
]
PredictorOption = Annotated[
    str,
    typer.Option(
        metavar="NAME|FILE",
        help="Read experts before they are needed, while that gains time: auto (the model's own "
        "routers, a layer ahead), a file of `predictor train`, or off.",
        rich_help_panel=MEMORY_PANEL,
    ),
]
ExpertSlotsOption = Annotated[
    ExpertSlots,
    typer.Option(
        help="Whether packed experts stay so in memory, where a third more fit; auto keeps them "
        "packed where a kernel computes from them as they are. On a GPU: in host memory behind it.",
        rich_help_panel=MEMORY_PANEL,
    ),
]
ExpertDtypeOption = Annotated[
    ExpertDtype,
    typer.Option(
        help="Round bfloat16 experts to int8 or int4 when they are read: lossy; twice or 3.5 times "
        "as many fit in memory. auto keeps every bit.",
        rich_help_panel=MEMORY_PANEL,
    ),
]
PlanOption = Annotated[
    PlanChoice,
    typer.Option(
        help="auto: choose what is not given here, by estimates and a few steps of the best; kept "
        "for the next start.",
        rich_help_panel=MODEL_PANEL,
    ),
]
DispatchOption = Annotated[
    Dispatch | None,
    typer.Option(
        help="Share the experts among the ranks, and move tokens to them: once to each rank that "
        "holds one of their experts (alltoall), all to all ranks (allreduce), what of these moves "
        "fewer bytes (auto), once to each node and on from there (hierarchical), with every rank "
        "knowing the context so that they stay there (coherent), or from ranks that tables "
        "foretell (speculative).",
        rich_help_panel=RANKS_PANEL,
    ),
]
PayloadOption = Annotated[
    Payload,
    typer.Option(
        help="Round hidden states to this in messages between ranks: lossy; exact keeps every bit.",
        rich_help_panel=RANKS_PANEL,
    ),
]
PipelineOption = Annotated[
    str,
    typer.Option(
        metavar="N|FILE",
        help="Run a layer's tokens in so many chunks, messages beside computing; or in what a file "
        "of `probe --collectives` says is best for each forward.",
        rich_help_panel=RANKS_PANEL,
    ),
]
AttentionOption = Annotated[
    Attention | None,
    typer.Option(
        help="Each rank runs attention of its own prompts (data), or all ranks run all prompts "
        "with a share of the heads each (tensor).",
        rich_help_panel=RANKS_PANEL,
    ),
]
TablesOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="For --dispatch speculative: where tokens should wait, as `placement solve --tables` "
        "writes it with the placement in use.",
        rich_help_panel=RANKS_PANEL,
    ),
]
MigrateOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A placement that all ranks go over to while they generate; see --migrate-after.",
        rich_help_panel=RANKS_PANEL,
    ),
]
MigrateAfter = Annotated[
    int,
    typer.Option(
        min=0,
        metavar="N",
        help="With --migrate: behind so many forwards, each a token of every rank's prompts.",
        rich_help_panel=RANKS_PANEL,
    ),
]
TimeoutSeconds = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS",
        help="How long a rank waits for the others before it gives up; 300 unless told.",
        rich_help_panel=RANKS_PANEL,
    ),
]
