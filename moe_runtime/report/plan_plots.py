"""A chart of plans: what a step of each waits for."""

from pathlib import Path
from typing import Any

from moe_runtime.perf.latency import Lane
from moe_runtime.perf.plan import Candidate, Plan

_MOST_BARS = 8
_DOTS_PER_INCH = 150
_COLOURS = {
    Lane.COMPUTE: "#0072B2", Lane.LINK: "#009E73", Lane.DISK: "#D55E00", Lane.SOFTWARE: "#888888",
}  # fmt: skip


def plot_plan(plan: Plan, path: Path, *, title: str) -> None:
    """Busy milliseconds of each lane, a group a plan, the best on top; a line ends its step."""
    from matplotlib.figure import Figure

    shown = (plan.chosen, *plan.others)[:_MOST_BARS]
    lanes = [lane for lane in Lane if any(one.step.lanes[lane] for one in shown)]
    figure = Figure(figsize=(8.2, 1.2 + 0.62 * len(shown)), layout="constrained")
    axes: Any = figure.subplots()
    height = 0.8 / len(lanes)
    for row, lane in enumerate(lanes):
        axes.barh(
            [index - 0.4 + (row + 0.5) * height for index in range(len(shown))],
            [1e3 * one.step.lanes[lane] for one in shown],
            height=height,
            color=_COLOURS[lane],
            label=lane.value,
        )
    for index, one in enumerate(shown):
        end = 1e3 * one.step.seconds
        axes.plot([end, end], [index - 0.42, index + 0.42], color="black", linewidth=1.4)
    axes.set_yticks(range(len(shown)), [_label(one) for one in shown], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds of a step, predicted; lanes overlap, black lines are its ends")
    axes.set_title(title, fontsize=10, loc="left")
    axes.grid(axis="x", color="#E5E5E5", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(lanes), frameon=False, fontsize=8)
    figure.savefig(path, dpi=_DOTS_PER_INCH)


def _label(candidate: Candidate) -> str:
    settings = candidate.settings
    words = [f"batch {settings.batch}", settings.policy]
    words += ["linears"] if settings.linears else []
    words += ["page cache"] if settings.page_cache else []
    words += ["prediction"] if settings.prefetch_layers else []
    words += [settings.miss] if settings.kv_place == "gpu" else []
    words += [name for name in (settings.expert_slots, settings.expert_dtype) if name != "auto"]
    return f"{', '.join(words)}\n{candidate.tokens_per_second:.4g} tokens/s"
