"""Who takes part at a residency, and why the others do not."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from moe_runtime.measure.bench.report import Outcome, Row
from moe_runtime.measure.bench.routing import Routing
from moe_runtime.measure.peers.catalog import OURS, Contestant


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineup:
    """Contestants to start, ours first, and rows that say why the rest are absent."""

    starting: list[Contestant]
    absent: list[Row] = field(default_factory=list)


def line_up(
    peers: Sequence[Contestant], *, residency: float, routing: Routing, no_gguf: str
) -> Lineup:
    """Ours always; of `peers` those that can run at this residency with this routing.

    `no_gguf` says why there is no GGUF, empty if there is one.
    """
    starting, absent = [OURS], []
    for peer in peers:
        reason = _reason(peer, residency, routing, no_gguf)
        if reason is None:
            starting.append(peer)
        else:
            absent.append(absent_row(peer, reason))
    return Lineup(starting=starting, absent=absent)


def absent_row(peer: Contestant, reason: str) -> Row:
    """A row without figures."""
    return Row(name=peer.name, title=peer.title, outcome=Outcome.ABSENT, note=reason)


def _reason(peer: Contestant, residency: float, routing: Routing, no_gguf: str) -> str | None:
    missing = peer.missing_packages()
    if missing:
        return f"{' and '.join(missing)} not installed: {peer.install}"
    if peer.needs_all_weights and residency < 1:
        return "runs with all weights in memory only; see --residency 100"
    if peer.is_offload_only and residency >= 1:
        return "with all weights in memory it is transformers itself"
    if not peer.replays_routing and routing.is_replayed:
        return "its router cannot be replaced; compare with --routing forced"
    if peer.reads_gguf and no_gguf:
        return f"no GGUF: {no_gguf}"
    return None
