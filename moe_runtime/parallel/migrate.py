"""Applies another placement while a model runs: experts travel from rank to rank.

L MoE layers, E experts a layer, G ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from moe_runtime.expert import ExpertKey
from moe_runtime.parallel.ledger import MIGRATION, Ledger
from moe_runtime.placement.rename import rename_within_topology
from moe_runtime.placement_map import Placement


class ExpertStore(Protocol):
    """The experts that a rank has in memory, as bytes that mean the same on every rank."""

    def blob_bytes(self, key: ExpertKey) -> int:
        """Of an expert as it stands in memory."""

    def resident_blob(self, key: ExpertKey) -> torch.Tensor | None:
        """`[n]` uint8, or None where `key` is not in memory; valid until the store changes."""

    def accept(self, key: ExpertKey, blob: torch.Tensor) -> None:
        """Keep an expert that came, where there is room; else it is read when it is used."""

    def forget(self, key: ExpertKey) -> None:
        """Make room of an expert that this rank does not hold any more."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A store, and the format in which it holds experts; bytes travel between equal formats."""

    store: ExpertStore
    format: str


@dataclass(frozen=True, slots=True)
class Move:
    """An expert that `target` holds from now on, and gets from `source`."""

    key: ExpertKey
    source: int
    target: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Migration:
    """From one placement to another with the fewest moves; the same on every rank.

    GPUs of the new placement, and its nodes, take the names of those that hold most of their
    experts already, for all layers alike; an expert that a rank holds stays, in whatever slot. So a
    move is an expert that a rank lacks. It comes from a holder on the rank's node, if there is one,
    else from any; of several from the one that sends least so far.
    """

    before: Placement
    after: Placement  # under its new names
    moves: tuple[Move, ...]  # by layer

    @classmethod
    def between(cls, before: Placement, wanted: Placement) -> "Migration":
        """Both are of one model and as many ranks."""
        hosts = before.hosts()
        after = rename_within_topology(wanted, hosts)
        per_node = after.gpus // after.nodes
        sent = np.zeros(before.gpus, np.int64)
        moves = []
        for layer, target, expert in np.argwhere(after.hosts() & ~hosts).tolist():
            holders = np.flatnonzero(hosts[layer, :, expert])
            near = holders[holders // per_node == target // per_node]
            choice = near if len(near) else holders
            source = int(choice[np.argmin(sent[choice])])
            sent[source] += 1
            moves.append(Move(ExpertKey(layer, expert), source, target))
        return cls(before=before, after=after, moves=tuple(moves))

    def dropped(self, rank: int) -> list[ExpertKey]:
        """What `rank` holds no more."""
        gone = self.before.hosts()[:, rank] & ~self.after.hosts()[:, rank]
        return [ExpertKey(layer, expert) for layer, expert in np.argwhere(gone).tolist()]


def migrate(ledger: Ledger, migration: Migration, stored: Stored | None) -> None:
    """Bring every expert that is in its source's memory into its target's; collective.

    First each source says which of its experts are there: a byte for each move. Then the experts
    travel, layer by layer, so that those of one layer at most are in memory twice. What is in no
    source's memory, or in a source of another format, is read by its target when it is used, as is
    all where `stored` is None.
    """
    rank, ranks = ledger.rank, range(ledger.num_ranks)
    formats = ledger.gather_texts("" if stored is None else stored.format)

    def is_there(move: Move) -> bool:
        can_go = stored is not None and formats[move.target] == stored.format
        return can_go and stored.store.resident_blob(move.key) is not None  # type: ignore[union-attr]

    leaving = [[m for m in migration.moves if (m.source, m.target) == (rank, g)] for g in ranks]
    coming = [[m for m in migration.moves if (m.source, m.target) == (g, rank)] for g in ranks]
    flags = [is_there(move) for part in leaving for move in part]
    sizes = [len(part) for part in leaving]
    ledger.expect(MIGRATION, sizes)
    asked = torch.tensor(flags, dtype=torch.uint8, device=ledger.device)
    answers = ledger.all_to_all(MIGRATION, asked, sizes, [len(part) for part in coming])
    flags += answers.tolist()  # sync: the host plans the rest
    known = [move for part in (*leaving, *coming) for move in part]
    travels = {move for move, flag in zip(known, flags, strict=True) if flag}
    dropped = migration.dropped(rank)
    moving = {move.key.layer for move in migration.moves}
    for layer in sorted(moving | {key.layer for key in dropped}):

        def of_layer(moves: list[Move], layer: int = layer) -> list[ExpertKey]:
            return [m.key for m in moves if m.key.layer == layer and m in travels]

        came: list[tuple[ExpertKey, torch.Tensor]] = []
        if layer in moving:  # on all ranks alike
            away, here = [[of_layer(part) for part in parts] for parts in (leaving, coming)]
            came = _exchange(ledger, stored, away, here)
        if stored is not None:
            for key in (key for key in dropped if key.layer == layer):  # first, to make room
                stored.store.forget(key)
            for key, blob in came:
                stored.store.accept(key, blob)


def _exchange(
    ledger: Ledger,
    stored: Stored | None,
    away: Sequence[Sequence[ExpertKey]],
    here: Sequence[Sequence[ExpertKey]],
) -> list[tuple[ExpertKey, torch.Tensor]]:
    """The experts of `here`, by source, for those of `away`, by target."""
    blobs = [torch.empty(0, dtype=torch.uint8)]
    sizes: dict[ExpertKey, int] = {}
    if stored is not None:
        sizes = {key: stored.store.blob_bytes(key) for part in (*away, *here) for key in part}
        blobs += [stored.store.resident_blob(key) for part in away for key in part]  # type: ignore[misc]
    send, receive = [[sum(sizes[key] for key in part) for part in p] for p in (away, here)]
    ledger.expect(MIGRATION, send)
    came = ledger.all_to_all(MIGRATION, torch.cat(blobs).to(ledger.device), send, receive).cpu()
    keys = [key for part in here for key in part]
    parts = torch.split(came, [sizes[key] for key in keys])
    return list(zip(keys, parts, strict=True))
