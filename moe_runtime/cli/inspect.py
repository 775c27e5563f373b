"""`moe-runtime inspect`: what a checkpoint is and how much memory it needs."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.table import Table

from moe_runtime.cli.options import Dtype, DtypeOption, Json, Model, Revision, TrustRemoteCode
from moe_runtime.cli.terminal import Terminal
from moe_runtime.expert_memory import format_bytes

if TYPE_CHECKING:
    from moe_runtime.measure.inspection import Inspection

EPILOG = """Examples:

moe-runtime inspect ./model

moe-runtime inspect org/name --json
"""


def inspect(
    model: Model,
    dtype: DtypeOption = Dtype.AUTO,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Show family, layers, experts and memory needs. Reads config and headers, no weights.

    A hub id is downloaded first, into the hub's cache.
    """
    terminal = Terminal(as_json=as_json)
    with terminal.waiting("starting"):
        from moe_runtime.integrations.transformers.progress import quiet_transformers
        from moe_runtime.measure.inspection import inspect_model

    with quiet_transformers(lambda done, total: None):
        found = inspect_model(
            model, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code
        )
    if as_json:
        terminal.show_json(found.as_dict())
        return
    table = Table(show_header=False)
    for name, value in _rows(found):
        table.add_row(name, value)
    terminal.show(table)


def _rows(found: "Inspection") -> Iterator[tuple[str, str]]:
    yield "model", f"{found.family} ({found.architecture}), {found.dtype}"
    yield "layers", f"{found.num_layers}, {found.num_moe_layers} of them with experts"
    yield (
        "experts",
        f"{found.experts_per_layer} a layer, {found.top_k} a token, {found.num_experts} in all",
    )
    if found.quantisation is not None:
        yield (
            "quantised",
            f"experts {found.quantisation} in files and memory, computed in {found.dtype}; other "
            f"weights become {found.dtype} while loading",
        )
    yield "one expert", format_bytes(found.expert_bytes)
    yield "all experts", format_bytes(found.expert_total_bytes)
    if found.packed_expert_bytes is not None:
        share = found.packed_expert_bytes / found.expert_total_bytes
        yield "packed experts", f"{format_bytes(found.packed_expert_bytes)} on disk ({share:.1%})"
    dense = format_bytes(found.dense_bytes)
    if found.lookup_bytes:
        dense += f", {format_bytes(found.lookup_bytes)} of it mapped on CPU"
    yield "dense weights", dense
    yield "attention cache", _cache(found)
    yield (
        "checkpoint",
        f"{format_bytes(found.checkpoint_bytes)} in {found.num_files} "
        f"{'file' if found.num_files == 1 else 'files'}, {found.expert_layout} tensors",
    )
    yield "smallest expert memory", f"{format_bytes(found.floor_bytes)}, with no reuse of experts"
    yield "reuse between tokens from", format_bytes(found.hitting_bytes)


def _cache(found: "Inspection") -> str:
    cache = found.kv_cache
    if cache is None:
        return "unknown for this family"
    text = f"{format_bytes(cache.bytes_per_token)} a token"
    if cache.windows:
        windows = ", ".join(str(window) for window in cache.windows)
        rest = cache.bytes_per_token - cache.window_bytes_per_token
        text += f", {format_bytes(rest)} beyond the window of {windows} tokens"
    if cache.state_bytes:
        text += f", and {format_bytes(cache.state_bytes)} once"
    return text
