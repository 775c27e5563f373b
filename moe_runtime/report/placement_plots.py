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

    before = _initial(placement)
    counts = RoutingCounts.of(traces)
    scores = {
        "before": evaluate(before, traces, topology),
        "after": evaluate(placement, traces, topology),
    }
    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    panels: Any = figure.subplots(2, 3)
    _draw_map(panels[0, 0], placement)
    crossing = {name: _crossing(score) for name, score in scores.items()}
    top = max(float(flow.max()) for flow in crossing.values()) or 1.0
    for axes, name in ((panels[0, 1], "before"), (panels[0, 2], "after")):
        layout = "experts in order of their ids" if name == "before" else "this placement"
        image = _draw_traffic(axes, crossing[name], top)
        axes.set_title(f"{layout}: {scores[name].crossing_fraction:.1%} cross", fontsize=9)
    figure.colorbar(image, ax=panels[0, 2], label="share of all transitions", format="{x:.1%}")
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
    palette = ListedColormap([*map(tuple, colours), _SEVERAL])
    image = axes.imshow(
        gpu_LE, aspect="auto", cmap=palette, vmin=-0.5, vmax=placement.gpus + 0.5,
        interpolation="nearest",
    )  # fmt: skip
    ticks = np.unique(np.linspace(0, placement.gpus - 1, min(placement.gpus, 8)).astype(int))
    bar = axes.figure.colorbar(image, ax=axes, ticks=[*ticks, placement.gpus])
    bar.ax.set_yticklabels([*(f"GPU {gpu}" for gpu in ticks), "several"])
    rows = np.unique(np.linspace(0, placement.num_layers - 1, 8).astype(int))
    axes.set_yticks(rows, [str(placement.layer_ids[row]) for row in rows])
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.set_title("which GPU holds which expert", fontsize=9)


def _draw_traffic(axes: Any, crossing: Array, top: float) -> Any:
    image = axes.imshow(crossing, cmap="magma_r", vmin=0.0, vmax=top, interpolation="nearest")
    axes.set_xlabel("to GPU")
    axes.set_ylabel("from GPU")
    return image


def _draw_loads(axes: Any, scores: dict[str, Evaluation], limit: object) -> None:
    """Of each GPU: its load over the mean GPU's, averaged over layers, and in its worst layer."""
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
    axes.set_xlabel("GPU")
    axes.set_ylabel("load over the mean GPU's")
    axes.set_title("load of GPUs, averaged over layers", fontsize=9)
    axes.legend(fontsize=7, framealpha=0.9, edgecolor="none", ncols=2, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_affinity(by_id: Any, by_gpu: Any, counts: RoutingCounts, placement: Placement) -> None:
    """Transitions of the pair of layers that depend most on each other, over what chance gives."""
    lift = [_lift(pair_EE) for pair_EE in counts.transitions]
    pair = int(np.argmax([value.max(initial=0.0) for value in lift]))
    found = np.log2(np.maximum(lift[pair], 2.0**-4))
    ids = placement.layer_ids[pair : pair + 2]
    for axes, is_grouped in ((by_id, False), (by_gpu, True)):
        orders = [np.arange(placement.num_experts)] * 2
        if is_grouped:
            first_gpu = placement.hosts().argmax(axis=1)
            orders = [np.argsort(first_gpu[pair + side], kind="stable") for side in (0, 1)]
        image = axes.imshow(
            found[np.ix_(*orders)], cmap="PuOr_r", vmin=-4, vmax=4, interpolation="nearest"
        )
        if is_grouped:
            for side, draw in ((0, axes.axhline), (1, axes.axvline)):
                edges = np.flatnonzero(np.diff(first_gpu[pair + side][orders[side]])) + 0.5
                for edge in edges:
                    draw(edge, color="#222222", linewidth=0.5)
        order = "by GPU" if is_grouped else "by id"
        axes.set_title(f"affinity of experts, {order}", fontsize=9)
        axes.set_xlabel(f"expert of layer {ids[1]}, {order}")
        axes.set_ylabel(f"expert of layer {ids[0]}, {order}")
    by_gpu.figure.colorbar(image, ax=by_gpu, label="transitions over chance, log2")


def _lift(pair_EE: Array) -> Array:
    """Transitions over what they would be if layers were independent; 1 where nothing is known."""
    chance = pair_EE.sum(axis=1, keepdims=True) * pair_EE.sum(axis=0, keepdims=True)
    total = pair_EE.sum()
    lift: Array = np.divide(pair_EE * total, chance, out=np.ones_like(pair_EE), where=chance > 0)
    return lift
