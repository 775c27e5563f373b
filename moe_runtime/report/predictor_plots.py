"""Charts of how right predictors were."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_runtime.predictors.evaluation import Evaluation
from moe_runtime.report.plots import check_plot_name

__all__ = ["check_plot_name", "plot_recall"]

_SIZE_INCHES = (9.6, 4.6)
_DOTS_PER_INCH = 150
_PANELS = {"1": "one layer ahead", "step": "before the first layer runs"}
_MARKERS = "osD^vX<>P*hp8"


def plot_recall(results: Sequence[Evaluation], path: Path, *, title: str) -> None:
    """Recall over layers, a line a predictor: one layer ahead, and a whole step ahead."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    panels: Any = figure.subplots(1, len(_PANELS), sharey=True)
    for axes, (moment, name) in zip(panels, _PANELS.items(), strict=True):
        for index, result in enumerate(results):
            shares = result.layer_recall.get(moment, [])
            line = [(layer, share) for layer, share in enumerate(shares) if share is not None]
            if line:
                axes.plot(
                    *zip(*line, strict=True),
                    label=result.predictor,
                    color=f"C{index % 10}",
                    marker=_MARKERS[index % len(_MARKERS)],
                    linestyle="-" if index < 10 else "--",
                    markersize=4,
                    linewidth=1.4,
                )
        axes.set_title(name, fontsize=10, loc="left")
        axes.set_xlabel("MoE layer")
        axes.set_ylim(0, 1.02)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
        axes.grid(color="#E5E5E5", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("recall of a token's experts")
    # Some predictors speak in one panel only.
    handles = {
        name: handle
        for axes in panels
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=_DOTS_PER_INCH)
