"""Options that commands of `moe-runtime placement` share."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from moe_runtime.cli.options import OUTPUT_PANEL

CLUSTER_PANEL = "Cluster"
GOAL_PANEL = "Goal"
SEARCH_PANEL = "Search"
DATA_PANEL = "Data"


class ObjectiveName(StrEnum):
    """What should become small."""

    TRANSITIONS = "transitions"
    FANOUT = "fanout"
    COCLUSTER = "cocluster"
    MIXED = "mixed"


class FormatName(StrEnum):
    """Whose placement file it is."""

    SGLANG = "sglang"
    TENSORRT_LLM = "tensorrt-llm"
    VLLM_ASCEND = "vllm-ascend"
    VLLM_LIST = "vllm-list"
    EXFLOW = "exflow"
    EPLB = "eplb"


Traces = Annotated[
    list[Path],
    typer.Argument(
        metavar="TRACE...", help="Routing traces of one model, .npz.", show_default=False
    ),
]
PlacementFile = Annotated[Path, typer.Argument(metavar="placement.json", show_default=False)]
Gpus = Annotated[
    int, typer.Option(min=1, help="GPUs that share the experts.", rich_help_panel=CLUSTER_PANEL)
]
Nodes = Annotated[
    int,
    typer.Option(
        min=1,
        help="Nodes that share the GPUs; a hop between nodes costs 2, within a node 1.",
        rich_help_panel=CLUSTER_PANEL,
    ),
]
TopologyFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help='Costs of hops: {"rank_cost_matrix": [[0, 1], [1, 0]]}, JSON or YAML.',
        rich_help_panel=CLUSTER_PANEL,
    ),
]
Replicas = Annotated[
    int,
    typer.Option(
        min=0,
        metavar="N",
        help="Slots a layer beyond one for each expert.",
        rich_help_panel=CLUSTER_PANEL,
    ),
]
ObjectiveOption = Annotated[
    ObjectiveName,
    typer.Option(help="What becomes small; see docs/placement.md.", rich_help_panel=GOAL_PANEL),
]
Balance = Annotated[
    float | None,
    typer.Option(
        metavar="LIMIT",
        help="In no layer a GPU's load may be above LIMIT times the mean GPU's.",
        rich_help_panel=GOAL_PANEL,
    ),
]
Weights = Annotated[
    list[str],
    typer.Option(
        "--weight",
        metavar="DOMAIN=W",
        help="Count a domain's tokens W times; once for each domain.",
        rich_help_panel=DATA_PANEL,
    ),
]
HoldOut = Annotated[
    float,
    typer.Option(
        metavar="SHARE",
        help="Share of every domain's tokens, in whole sequences, that is only for judging.",
        rich_help_panel=DATA_PANEL,
    ),
]
NumExperts = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Experts a layer, for files that do not say it, or wrongly.",
        rich_help_panel=DATA_PANEL,
    ),
]
TimeLimit = Annotated[
    float,
    typer.Option(
        min=0.1, metavar="SECONDS", help="Stop with the best so far.", rich_help_panel=SEARCH_PANEL
    ),
]
Seed = Annotated[
    int, typer.Option(min=0, help="Makes a search repeatable.", rich_help_panel=SEARCH_PANEL)
]
Plot = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.png",
        help="Draw map, traffic, load and affinity (.png, .svg or .pdf).",
        rich_help_panel=OUTPUT_PANEL,
    ),
]
PlacementOutput = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="placement.json",
        help="Write the placement to this file.",
        rich_help_panel=OUTPUT_PANEL,
    ),
]


def parse_weights(words: list[str]) -> dict[str, float]:
    """`coding=2` as a mapping."""
    weights: dict[str, float] = {}
    for word in words:
        name, equals, value = word.rpartition("=")
        try:
            weights[name] = float(value)
        except ValueError:
            equals = ""
        if not equals or not name:
            raise typer.BadParameter(f"--weight {word!r} is no domain and weight; write coding=2")
    return weights
