"""Charts of where decode steps spend their time."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_runtime.report.plots import check_plot_name

__all__ = ["check_plot_name", "plot_profile"]

_PANEL_INCHES, _HEIGHT_INCHES = 6.4, 4.4
_DOTS_PER_INCH = 150


def plot_profile(
    parts: Mapping[int, Mapping[str, float]],
    tklqt_seconds: Mapping[int, float],
    path: Path,
    *,
    title: str,
    transition_batch: int | None,
) -> None:
    """Milliseconds of a step by part, a bar a batch size; beside it TKLQT, if any is known.

    `parts` maps batch size to seconds of each part, `tklqt_seconds` to that of a step.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    num_panels = 2 if tklqt_seconds else 1
    figure = Figure(figsize=(num_panels * _PANEL_INCHES, _HEIGHT_INCHES), layout="constrained")
    panels: Any = figure.subplots(1, num_panels, squeeze=False)[0]
    batches = list(parts)
    _stack(panels[0], parts)
    panels[0].set_xticks(range(len(batches)), [str(batch) for batch in batches])
    panels[0].set_ylabel("milliseconds a step, under the profiler")
    if tklqt_seconds:
        axes = panels[1]
        line = sorted(tklqt_seconds.items())
        axes.plot([b for b, _ in line], [1e3 * s for _, s in line], marker="o", color="#0072B2")
        axes.set_xscale("log", base=2)
        axes.set_xticks([b for b, _ in line])
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(bottom=0)
        axes.set_ylabel("launch and queue time of a step's kernels (TKLQT), ms")
        if transition_batch is not None:
            axes.axvline(transition_batch, color="#D55E00", linestyle="--", linewidth=1)
            axes.set_title(f"kernels queue from batch {transition_batch} on", fontsize=10)
    for axes in panels:
        axes.set_xlabel("batch size")
        axes.grid(axis="y", color="#E5E5E5", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=_DOTS_PER_INCH)


def _stack(axes: Any, parts: Mapping[int, Mapping[str, float]]) -> None:
    """The part that takes most at the bottom."""
    names = {name for found in parts.values() for name in found}
    totals = {name: sum(found.get(name, 0.0) for found in parts.values()) for name in names}
    ordered: Sequence[str] = sorted(names, key=lambda name: (-totals[name], name))
    floor = [0.0] * len(parts)
    for index, name in enumerate(ordered):
        heights = [1e3 * found.get(name, 0.0) for found in parts.values()]
        axes.bar(range(len(parts)), heights, bottom=floor, width=0.6, color=f"C{index}", label=name)
        floor = [below + height for below, height in zip(floor, heights, strict=True)]
    axes.legend(framealpha=0.9, edgecolor="none", fontsize=8)
