"""Charts of what was simulated or measured."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_runtime.simulate.replay import SimulationResult

FORMATS = (".png", ".svg", ".pdf")

_SIZE_INCHES = (7.2, 4.5)
_DOTS_PER_INCH = 150
_BOUND = "belady"
# Okabe and Ito's colours, told apart by colour-blind readers too; a bound is no contestant: grey.
_COLOURS = {"lru": "#0072B2", "lfu": "#D55E00", "static": "#009E73", _BOUND: "#555555"}
_MARKERS = {"lru": "o", "lfu": "s", "static": "^", _BOUND: "x"}


def plot_hit_rates(
    results: Sequence[SimulationResult], path: Path, *, title: str, num_experts: int, floor: int
) -> None:
    """Hit rate over slots, a line a policy, to a file whose ending is one of FORMATS.

    `num_experts` are those of all layers; `floor` the slots that one token uses in all layers.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    axes: Any = figure.subplots()
    # The bound is drawn and named first, as it lies on top.
    policies = dict.fromkeys(result.policy for result in results)
    for policy in sorted(policies, key=lambda name: name != _BOUND):
        line = sorted((r.slots, r.hit_rate) for r in results if r.policy == policy)
        axes.plot(
            *zip(*line, strict=True),
            label=_label(policy, results),
            color=_COLOURS.get(policy),
            linestyle="--" if policy == _BOUND else "-",
            marker=_MARKERS.get(policy, "D"),
            markersize=5,
            linewidth=1.6,
        )
    sizes = [result.slots for result in results]
    axes.set_xlim(0, 1.04 * max(sizes))
    axes.set_ylim(0, 1.02)
    if floor <= max(sizes):
        axes.axvline(floor, color="#AAAAAA", linewidth=0.8, linestyle=":", zorder=0)
        axes.annotate(
            "experts of one token",
            (floor, 0.02),
            xytext=(-2, 0),
            textcoords="offset points",
            rotation=90,
            ha="right",
            va="bottom",
            color="#888888",
            fontsize=8,
        )
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.set_xlabel("slots, shared by all layers")
    axes.set_ylabel("accesses that hit")
    axes.set_title(title, fontsize=10, loc="left")
    axes.grid(color="#E5E5E5", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(framealpha=0.9, edgecolor="none")
    percent = axes.secondary_xaxis(
        "top",
        functions=(
            lambda slots: 100 * slots / num_experts,
            lambda percent: percent * num_experts / 100,
        ),
    )
    percent.xaxis.set_major_formatter(PercentFormatter(decimals=0))
    percent.set_xlabel(f"share of all {num_experts} experts")
    percent.spines["top"].set_visible(False)
    figure.savefig(path, dpi=_DOTS_PER_INCH)


def check_plot_name(path: Path) -> None:
    """Raise ValueError unless the file's ending names a format."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"plot {path} ends in none of {', '.join(FORMATS)}; name it {path}.png")


def _label(policy: str, results: Sequence[SimulationResult]) -> str:
    if policy == _BOUND:
        return "Belady, the bound"
    sees_future = any(r.sees_future for r in results if r.policy == policy)
    name = policy if policy == "static" else policy.upper()
    return f"{name}, of this very trace" if sees_future else name
