"""Pictures of a placement: who holds what, what crosses, who works how much, what belongs together.

L MoE layers, E experts a layer, G GPUs.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moe_runtime.placement.evaluate import Evaluation, evaluate
from moe_runtime.placement.routing_counts import RoutingCounts
from moe_runtime.placement.topology import Topology
from moe_runtime.placement_map import Placement
from moe_runtime.trace import Trace

Array = np.ndarray[Any, Any]

_SIZE_INCHES = (13.0, 7.6)
_DOTS_PER_INCH = 130
_SEVERAL = "#DDDDDD"  # an expert with replicas belongs to no one GPU
_COLOURS = {"before": "#999999", "after": "#0072B2", "limit": "#D55E00"}


def plot_placement(
    placement: Placement, traces: Sequence[Trace], path: Path, *, topology: Topology
) -> None:
    """Six pictures of `placement` on `traces`, beside the layout that engines start with.

    Map of experts to GPUs by layer; transitions between GPUs before and after; load of GPUs before
    and after; and the most dependent pair of layers, its experts by id and by GPU.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    before = _initial(placement)
    counts = RoutingCounts.of(traces)
    scores = {
        "before": evaluate(before, traces, topology),
        "after": evaluate(placement, traces, topology),
    }
    figure = Figure(figsize=_SIZE_INCHES, layout=ConstrainedLayoutEngine(w_pad=0.1))
    panels: Any = figure.subplots(2, 3)
    _draw_map(panels[0, 0], placement)
    crossing = {name: _crossing(score) for name, score in scores.items()}
    top = max(float(flow.max()) for flow in crossing.values()) or 1.0
    for axes, name in ((panels[0, 1], "before"), (panels[0, 2], "after")):
        layout = "experts in order of their ids" if name == "before" else "this placement"
        image = _draw_traffic(axes, crossing[name], top)
        axes.set_title(f"{layout}: {scores[name].crossing_fraction:.1%} cross", fontsize=9)
    figure.colorbar(image, ax=panels[0, 2], label="share of all transitions", format="{x:.2%}")
    _draw_loads(panels[1, 0], scores, placement.made.get("balance"))
    if counts.num_layers > 1:
        _draw_affinity(panels[1, 1], panels[1, 2], counts, placement)
    else:
        panels[1, 1].axis("off")
        panels[1, 2].axis("off")
    tokens = sum(trace.num_tokens for trace in traces)
    figure.suptitle(
        f"{placement.model}: {placement.num_layers} layers of {placement.num_experts} experts in "
        f"{placement.num_slots} slots on {placement.gpus} GPUs, {tokens:,} tokens",
        fontsize=11,
    )
    figure.savefig(path, dpi=_DOTS_PER_INCH)


def _initial(placement: Placement) -> Placement:
    """Experts in the order of their ids, redundant slots from the first on, as engines start."""
    row = np.arange(placement.num_slots) % placement.num_experts
    return replace(placement, slots=np.tile(row, (placement.num_layers, 1)), made={})


def _crossing(score: Evaluation) -> Array:
    """`[G, G]` share of all transitions, 0 for those that stay."""
    shares: Array = score.traffic / max(int(score.traffic.sum()), 1)
    np.fill_diagonal(shares, 0.0)
    return shares


def _draw_map(axes: Any, placement: Placement) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    hosts = placement.hosts()
    gpu_LE = np.where(hosts.sum(axis=1) > 1, placement.gpus, hosts.argmax(axis=1))
    colours = colormaps["turbo"](np.linspace(0.03, 0.97, placement.gpus))
    several = [_SEVERAL] if placement.is_replicated else []
    palette = ListedColormap([*map(tuple, colours), *several])
    image = axes.imshow(
        gpu_LE, aspect="auto", cmap=palette, vmin=-0.5, vmax=palette.N - 0.5,
        interpolation="nearest",
    )  # fmt: skip
    labels = {gpu: f"GPU {gpu}" for gpu in range(0, placement.gpus, -(-placement.gpus // 8))}
    if placement.is_replicated:
        labels[placement.gpus] = "several GPUs"
    bar = axes.figure.colorbar(image, ax=axes, ticks=list(labels))
    bar.ax.set_yticklabels(list(labels.values()))
    rows = np.unique(np.linspace(0, placement.num_layers - 1, 8).astype(int))
    axes.set_yticks(rows, [str(placement.layer_ids[row]) for row in rows])
    _whole_ticks(axes.xaxis)
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.set_title("which GPU holds which expert", fontsize=9)


def _draw_traffic(axes: Any, crossing: Array, top: float) -> Any:
    image = axes.imshow(crossing, cmap="magma_r", vmin=0.0, vmax=top, interpolation="nearest")
    _whole_ticks(axes.xaxis, axes.yaxis)
    axes.set_xlabel("to GPU")
    axes.set_ylabel("from GPU")
    return image


def _whole_ticks(*axes: Any) -> None:
    """Experts and GPUs have no halves."""
    from matplotlib.ticker import MaxNLocator

    for axis in axes:
        axis.set_major_locator(MaxNLocator(nbins=8, integer=True))


def _draw_loads(axes: Any, scores: dict[str, Evaluation], limit: object) -> None:
    """Of each GPU: its load over the mean GPU's, averaged over layers, and in its worst layer."""
    from matplotlib.ticker import MaxNLocator

    num_gpus = len(scores["after"].per_layer[0].gpu_load)
    gpus = np.arange(num_gpus)
    for shift, name in ((-0.2, "before"), (0.2, "after")):
        load_LG = np.array([layer.gpu_load for layer in scores[name].per_layer])
        ratio_LG = load_LG / np.maximum(load_LG.mean(axis=1, keepdims=True), 1e-30)
        axes.bar(gpus + shift, ratio_LG.mean(axis=0), 0.4, color=_COLOURS[name], label=name)
        axes.plot(
            gpus + shift,
            ratio_LG.max(axis=0),
            "_",
            color="#222222",
            markersize=max(2.0, 120 / num_gpus),
            label="its busiest layer" if name == "after" else None,
        )
    if isinstance(limit, int | float):
        axes.axhline(limit, color=_COLOURS["limit"], linewidth=1, label=f"limit {limit:g}")
    axes.axhline(1.0, color="#444444", linewidth=0.6, linestyle=":")
    axes.set_ylim(0, 1.3 * axes.get_ylim()[1])  # room for the legend
    axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True))
    axes.set_xlabel("GPU")
    axes.set_ylabel("load over the mean GPU's")
    axes.set_title("load of GPUs, averaged over layers", fontsize=9)
    axes.legend(fontsize=7, framealpha=0.9, edgecolor="none", ncols=2, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_affinity(by_id: Any, by_gpu: Any, counts: RoutingCounts, placement: Placement) -> None:
    """Where each expert's tokens go next, for the pair of layers that depend most on each other."""
    pair = int(np.argmax([_dependence_bits(pair_EE) for pair_EE in counts.transitions]))
    pair_EE = counts.transitions[pair]
    share_EE = pair_EE / np.maximum(pair_EE.sum(axis=1, keepdims=True), 1e-300)
    top = float(np.quantile(share_EE, 0.995)) or 1.0
    ids = placement.layer_ids[pair : pair + 2]
    gpus = placement.hosts().argmax(axis=1)[pair : pair + 2]  # of the first replica
    by_ids = [np.arange(placement.num_experts)] * 2
    by_gpus = [np.argsort(gpu, kind="stable") for gpu in gpus]
    for axes, orders, order in ((by_id, by_ids, "by id"), (by_gpu, by_gpus, "by GPU")):
        image = axes.imshow(
            share_EE[np.ix_(*orders)], cmap="magma_r", vmin=0.0, vmax=top, interpolation="nearest"
        )
        axes.set_title(f"affinity of layers {ids[0]} and {ids[1]}, experts {order}", fontsize=9)
        _whole_ticks(axes.xaxis, axes.yaxis)
        axes.set_xlabel(f"expert of layer {ids[1]}")
        axes.set_ylabel(f"expert of layer {ids[0]}")
    for gpu, ordered, draw in zip(gpus, by_gpus, (by_gpu.axhline, by_gpu.axvline), strict=True):
        for edge in np.flatnonzero(np.diff(gpu[ordered])) + 0.5:
            draw(edge, color="#0072B2", linewidth=min(0.8, 8 / placement.gpus))
    by_gpu.figure.colorbar(image, ax=by_gpu, label="share of the expert's tokens", format="{x:.0%}")


def _dependence_bits(pair_EE: Array) -> float:
    """Mutual information of the first experts of two layers."""
    joint = pair_EE / max(float(pair_EE.sum()), 1e-300)
    chance = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log2(joint[seen] / chance[seen])).sum())
