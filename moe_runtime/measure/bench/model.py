"""The files that a benchmark runs on: a checkpoint given or made, and its GGUF."""

from collections.abc import Callable, Sequence
from pathlib import Path

from moe_runtime.errors import UnsupportedModelError
from moe_runtime.integrations.gguf import write_gguf
from moe_runtime.measure.bench.presets import load_preset
from moe_runtime.measure.bench.random_checkpoint import write_random_checkpoint
from moe_runtime.measure.bench.routing import Routing
from moe_runtime.measure.peers.catalog import Contestant

OnProgress = Callable[[int, int], None]  # bytes written, bytes in all


def make_checkpoint(
    like: str,
    work_folder: Path,
    *,
    num_layers: int | None,
    routings: Sequence[Routing],
    on_progress: OnProgress,
) -> tuple[Path, str]:
    """A random checkpoint with the shapes of the preset `like`; and a remark if it departs from it.

    A replayed trace needs a model with its number of experts and its top-k. Made once and reused.
    """
    preset = load_preset(like)
    num_experts, top_k, remark = preset.num_experts, preset.top_k, ""
    traces = [routing for routing in routings if routing.trace is not None]
    for routing in traces:
        assert routing.trace is not None
        num_experts, top_k = routing.trace.num_experts, routing.trace.top_k
        if (num_experts, top_k) != (preset.num_experts, preset.top_k):
            remark = (
                f"{like} with {num_experts} experts a layer and top-{top_k} as in {routing.name}, "
                f"instead of {preset.num_experts} and top-{preset.top_k}"
            )
    shapes = {(one.trace.num_experts, one.trace.top_k) for one in traces if one.trace is not None}
    if len(shapes) > 1:
        raise ValueError(
            "the traces of --routing have different numbers of experts or top-k; "
            "run them one by one"
        )
    layers = preset.num_layers if num_layers is None else num_layers
    folder = work_folder / f"{like}-{layers}x{num_experts}-top{top_k}"
    write_random_checkpoint(
        preset,
        folder,
        num_layers=layers,
        num_experts=num_experts,
        top_k=top_k,
        on_progress=on_progress,
    )
    return folder, remark


def make_gguf(
    checkpoint: Path, work_folder: Path, peers: Sequence[Contestant], on_progress: OnProgress
) -> tuple[Path | None, str]:
    """The same weights as GGUF if one of `peers` that can run reads it; else None, and why."""
    if not any(peer.reads_gguf and not peer.missing_packages() for peer in peers):
        return None, "nobody reads it"
    file = work_folder / f"{checkpoint.resolve().name}.gguf"
    try:
        return write_gguf(checkpoint, file, on_progress=on_progress), ""
    except UnsupportedModelError as error:
        return None, str(error)
