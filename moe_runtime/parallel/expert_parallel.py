"""One model's experts on several ranks: keeps their forwards in step, layer by layer.

G ranks, T tokens of this rank, K top-k, D model dim.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moe_runtime.errors import ParallelError
from moe_runtime.parallel.allreduce import AllReduceDispatcher
from moe_runtime.parallel.alltoall import AllToAllDispatcher
from moe_runtime.parallel.auto import AutoDispatcher
from moe_runtime.parallel.degree import Degree, FixedDegree
from moe_runtime.parallel.dispatcher import Dispatcher, Rows
from moe_runtime.parallel.expected import ExpectedBytes
from moe_runtime.parallel.hierarchical import HierarchicalDispatcher
from moe_runtime.parallel.ledger import ATTENTION, CONTEXT, CONTROL, MIGRATION
from moe_runtime.parallel.local import LocalDispatcher
from moe_runtime.parallel.local_activations import LocalActivations
from moe_runtime.parallel.migrate import Migration, Stored, migrate
from moe_runtime.parallel.payload import ExactPayload, Payload, make_payload
from moe_runtime.parallel.pipeline import run_in_chunks
from moe_runtime.parallel.plan import ExpertPlan, check_placement
from moe_runtime.parallel.world import World
from moe_runtime.placement_map import Placement

DISPATCHES = ("auto", "alltoall", "allreduce", "hierarchical", "coherent", "speculative")
ATTENTIONS = ("data", "tensor")  # whole, for prompts of a rank's own; a share of the heads
_STOP, _MIGRATE = 1, 2  # wishes of a rank, as bits
_ONE_CHUNK = FixedDegree(1)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# `[T, D]`, `[T, K]`, `[T, K]` -> weighted sum of the experts that are here, `[T, D]`.
ComputeExperts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# What an experts module gets, `[T, D]`, where decoder layers are stepped from outside.
AnswerExperts = Callable[[int, Rows], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Step:
    """One forward of the ranks that have tokens; the others take part without any."""

    tokens_by_rank: list[int]
    extras_by_rank: list[int]  # rows that stand behind those of tokens, in what follows
    is_stop_asked: bool
    degree: int  # chunks of each layer
    empty: Rows  # no rows, in the sizes and dtypes of this forward

    @property
    def is_idle(self) -> bool:
        return not any(self.tokens_by_rank)


class ExpertParallel:
    """What experts modules hand their tokens to.

    Ranks run forwards of their own, in step: a forward begins when every rank begins one, or is in
    `finish()`, where it takes part with no tokens until all ranks are. Layers come in order, each
    once a forward. Not for several threads.
    """

    def __init__(
        self,
        world: World,
        plan: ExpertPlan,
        dispatch: str,
        *,
        payload: str = ExactPayload.name,
        degree: Degree = _ONE_CHUNK,
    ) -> None:
        self.world = world
        self.plan = plan
        world.ledger.num_nodes = plan.num_nodes
        self.dispatch = dispatch if world.num_ranks > 1 else LocalDispatcher.name
        self._payload = make_payload(payload)
        self._degree = degree
        self._num_steps_by_degree: Counter[int] = Counter()
        self.dispatcher = make_dispatcher(dispatch, world, plan, self._payload)
        self._layers: list[ComputeExperts] = []
        self._answer: AnswerExperts | None = None
        self._take_part: Callable[[], bool] | None = None
        self.expected: ExpectedBytes | None = None  # what `auto` chose by when loading
        self.activations = LocalActivations()
        self.is_seen_T: torch.Tensor | None = None  # ids of this forward that tables have seen
        self._step: Step | None = None
        self._next_layer = 0
        self._num_steps = 0
        self._wants_stop = False
        self._wanted: Placement | None = None
        self._stored: Stored | None = None
        self._num_moves = 0
        self._is_together = True  # whether all ranks are known to stand at the same place
        self._is_closed = False

    def attach(self, compute: ComputeExperts) -> int:
        """Add the next MoE layer; returns its number."""
        self._layers.append(compute)
        return len(self._layers) - 1

    def store_in(self, stored: Stored) -> None:
        """Where the experts that `attach`ed layers compute with are; without it none can travel."""
        self._stored = stored

    def hand_over(
        self, answer: AnswerExperts | None, take_part: Callable[[], bool] | None = None
    ) -> None:
        """Let `answer` stand for the experts, as decoder layers are stepped from outside.

        `take_part` joins a forward without tokens, and returns False if no rank has one.
        """
        self._answer, self._take_part = answer, take_part

    def compute(self, layer: int, rows: Rows) -> torch.Tensor:
        """What the experts that are here make of `rows`."""
        return self._layers[layer](rows.hidden, rows.index, rows.weights)

    def begin(self, rows: Rows | None, *, num_extra: int = 0) -> Step:
        """Agree on a forward that is stepped from outside; `end` follows. Collective."""
        self._is_together = False
        self._require_between_forwards()
        step = self._agree(rows, num_extra)
        self._next_layer = int(not step.is_idle)
        return step

    def end(self) -> None:
        """Every layer of the forward has run."""
        self._next_layer = 0

    @property
    def is_stop_asked(self) -> bool:
        """Whether a rank had asked to stop when this forward began; the same on all ranks."""
        return self._step is not None and self._step.is_stop_asked

    def ask_to_stop(self) -> None:
        """Let every rank hear, at the next forward, that this one should end early."""
        self._wants_stop = True

    def ask_to_migrate(self, placement: str | Path | Placement) -> None:
        """Go over to another placement when the next forward of any rank begins.

        One rank asks, or several for the same. Tokens stay what they are: all ranks change at the
        same place, between forwards. Raises PlacementError, here, if it does not fit, and
        ParallelError under coherent dispatch and tensor attention, whose tables know one placement.
        """
        if self._answer is not None:
            raise ParallelError(
                f"dispatch {self.dispatch!r} steps layers along one placement; load with alltoall, "
                "allreduce, hierarchical or auto to migrate"
            )
        wanted = placement if isinstance(placement, Placement) else Placement.load(placement)
        checkpoint = self.plan.placement.checkpoint
        check_placement(
            wanted,
            num_experts=self.plan.num_experts,
            num_layers=len(self.plan.held),
            num_ranks=self.plan.num_ranks,
            checkpoint=checkpoint,
        )
        self._wanted = replace(wanted, checkpoint=checkpoint)

    def run(
        self,
        layer: int,
        hidden_TD: torch.Tensor,
        top_k_index_TK: torch.Tensor,
        top_k_weights_TK: torch.Tensor,
    ) -> torch.Tensor:
        """`[T, D]`: each token's experts, wherever they are."""
        rows = Rows(hidden_TD, top_k_index_TK, top_k_weights_TK)
        if self._answer is not None:
            return self._answer(layer, rows)
        self._is_together = False
        if layer == 0:
            self._begin(rows)
        step = self._step
        if step is None or layer != self._next_layer:
            raise ParallelError(
                f"rank {self.world.rank} runs MoE layer {layer} where layer {self._next_layer} is "
                "next; with expert parallelism every forward runs each layer once, in order, so "
                "after an interrupted one load the model again"
            )
        if len(rows) != step.tokens_by_rank[self.world.rank]:
            raise ParallelError(
                f"MoE layer {layer} got {len(rows)} tokens and layer 0 "
                f"{step.tokens_by_rank[self.world.rank]}; expert parallelism needs the same tokens "
                "in every MoE layer of a forward"
            )
        if self.is_seen_T is not None:
            owner = self.plan.nearest.owners(layer, rows.index, first_turn=self.plan.rank)
            self.activations.add(owner == self.plan.rank, self.is_seen_T)
        return self._run_layer(layer, rows, step)

    def finish(self) -> None:
        """Take part in the others' forwards without tokens, until every rank is here; collective.

        To be called by every rank after its last forward, and before `agree` or `close`.
        """
        self._require_between_forwards()
        while self._take_part is not None and self._take_part():
            pass
        while self._take_part is None:
            step = self._agree(None)
            if step.is_idle:
                break
            for layer in range(len(self._layers)):
                self._run_layer(layer, step.empty, step)
        self._is_together = True

    def close(self) -> None:
        """Leave the process group if it was made for this model. Safe to call twice.

        After `finish()` ranks wait for each other here; without it the others are cut off.
        """
        if not self._is_closed:
            self._is_closed = True
            self.world.close(orderly=self._is_together)

    def report(self) -> dict[str, Any]:
        """What this rank sent, by layer and rank; counts are since loading."""
        ledger = self.world.ledger
        others = (CONTROL, MIGRATION)  # than what forwards send
        layers = {n: line for n, line in ledger.sent().items() if n not in others}
        moved = ledger.sent().get(MIGRATION)
        everything = ledger.sent().values()
        to_rank = [sum(line.num_bytes[g] for line in everything) for g in range(ledger.num_ranks)]
        node = ledger.node_of(ledger.rank)
        within = [ledger.node_of(g) == node for g in range(ledger.num_ranks)]
        chosen = self.dispatcher.chosen if isinstance(self.dispatcher, AutoDispatcher) else None
        if chosen is not None and self._take_part is not None:
            chosen = {"coherent": self._num_steps * len(self._layers)}
        return {
            "rank": ledger.rank,
            "ranks": ledger.num_ranks,
            "nodes": ledger.num_nodes,
            "dispatch": self.dispatch,
            "payload": self._payload.name,
            "chosen": chosen,
            "expected_bytes": None if self.expected is None else asdict(self.expected),
            "experts_held": self.plan.num_held,
            "forwards": self._num_steps,
            "forwards_by_chunks": {
                str(degree): count for degree, count in self._num_steps_by_degree.items() if count
            },
            "experts_moved": self._num_moves,  # by all ranks
            "migration_bytes": 0 if moved is None else sum(moved.num_bytes),
            "bytes_to_rank": to_rank,
            "messages_to_rank": [
                sum(line.messages[g] for line in everything) for g in range(ledger.num_ranks)
            ],
            "bytes_within_node": sum(b for b, near in zip(to_rank, within, strict=True) if near),
            "bytes_between_nodes": sum(
                b for b, near in zip(to_rank, within, strict=True) if not near
            ),
            "moe_bytes": sum(sum(line.num_bytes) for line in layers.values()),
            "moe_predicted_bytes": sum(sum(line.predicted_bytes) for line in layers.values()),
            "context_bytes": sum(layers[CONTEXT].num_bytes) if CONTEXT in layers else 0,
            "attention_bytes": sum(layers[ATTENTION].num_bytes) if ATTENTION in layers else 0,
            "activations": self.activations.report(),
            "per_layer_bytes": [sum(line.num_bytes) for n, line in layers.items() if n >= 0],
            "calls": ledger.calls(),
        }

    def _begin(self, rows: Rows) -> None:
        self._require_between_forwards()
        if not len(rows):
            raise ParallelError("a forward has no tokens; call finish() on a rank that has none")
        self._agree(rows)

    def _require_between_forwards(self) -> None:
        if self._next_layer:
            raise ParallelError(
                f"the last forward of rank {self.world.rank} ended before MoE layer "
                f"{self._next_layer}, and the other ranks are behind it; load the model again"
            )

    def _agree(self, rows: Rows | None, num_extra: int = 0) -> Step:
        """The next forward, as all ranks have it; `rows` are this rank's, None if it is done."""
        wishes = self._wants_stop * _STOP + (self._wanted is not None) * _MIGRATE
        mine = [0, wishes, num_extra, 0, 0, 0, 0, 0]
        if rows is not None:
            mine = [len(rows), wishes, num_extra, *_shape_code(rows)]
        ledger = self.world.ledger
        sent = torch.tensor(mine, dtype=torch.int32, device=ledger.device)
        heard = ledger.all_gather(CONTROL, sent).tolist()  # sync: the host plans the forward
        tokens = [line[0] for line in heard]
        shapes = {tuple(line[3:]) for line in heard if line[0]}
        if len(shapes) > 1:
            raise ParallelError(
                "ranks disagree on the shape of rows (model dim, top-k and dtypes, as numbers): "
                f"{sorted(shapes)}; load the same model with the same dtype on every rank"
            )
        shape = next(iter(shapes), (0, 0, 0, 0, 0))
        if any(line[1] & _MIGRATE for line in heard):
            self._migrate()
        is_stop_asked = any(line[1] & _STOP for line in heard)
        empty = _empty_rows(shape, ledger.device)
        row = empty.row_bytes(self._payload)
        degree = self._degree.chunks(tokens, row, empty.index.shape[1]) if any(tokens) else 1
        step = Step(tokens, [line[2] for line in heard], is_stop_asked, degree, empty)
        self._step = step
        self._num_steps_by_degree[degree] += not step.is_idle
        self._num_steps += not step.is_idle
        return step

    def _migrate(self) -> None:
        """To the placement that any rank wants, on all of them; collective."""
        mine = self._wanted
        texts = self.world.ledger.gather_texts("" if mine is None else mine.to_json())
        wanted = sorted(set(filter(None, texts)))
        if len(wanted) > 1:
            asked = [rank for rank, text in enumerate(texts) if text]
            raise ParallelError(
                f"ranks {', '.join(map(str, asked))} ask for {len(wanted)} different placements "
                "at once; let one of them ask, or all for the same"
            )
        to = Placement.from_json(json.loads(wanted[0]), source="the placement to migrate to")
        migration = Migration.between(self.plan.placement, to)
        migrate(self.world.ledger, migration, self._stored)
        before = self.dispatcher
        self.plan = ExpertPlan.of(migration.after, self.world.rank)
        self.world.ledger.num_nodes = self.plan.num_nodes
        self.dispatcher = make_dispatcher(self.dispatch, self.world, self.plan, self._payload)
        if isinstance(self.dispatcher, AutoDispatcher) and isinstance(before, AutoDispatcher):
            self.dispatcher.chosen = before.chosen
        self._num_moves += len(migration.moves)
        self._wanted = None

    def _run_layer(self, layer: int, rows: Rows, step: Step) -> torch.Tensor:
        compute = self._layers[layer]
        combined = run_in_chunks(
            self.dispatcher,
            layer,
            rows,
            step.tokens_by_rank,
            lambda here: compute(here.hidden, here.index, here.weights),
            degree=step.degree,
        )
        self._next_layer = (layer + 1) % len(self._layers)
        return combined


def make_dispatcher(name: str, world: World, plan: ExpertPlan, payload: Payload) -> Dispatcher[Any]:
    """The dispatcher of that name; that of one process where there is one.

    Under coherent and speculative dispatch it serves what is not stepped from outside.
    """
    check_dispatch(name, payload.name)
    if world.num_ranks == 1:
        return LocalDispatcher()
    if name == AllReduceDispatcher.name:
        return AllReduceDispatcher(plan, world.ledger)
    kinds = {kind.name: kind for kind in (AutoDispatcher, HierarchicalDispatcher)}
    return kinds.get(name, AllToAllDispatcher)(plan, world.ledger, payload)


def check_dispatch(dispatch: str, payload: str) -> None:
    """Raise ValueError for a name that is unknown, or a pair that makes no sense."""
    if dispatch not in DISPATCHES:
        raise ValueError(f"dispatch {dispatch!r} is unknown; choose from {', '.join(DISPATCHES)}")
    make_payload(payload)
    if dispatch == AllReduceDispatcher.name and payload != ExactPayload.name:
        raise ValueError(
            f"payload {payload!r} rounds rows, and dispatch 'allreduce' adds sums up on their way; "
            "leave payload out, or choose alltoall, hierarchical or auto"
        )


def _shape_code(rows: Rows) -> tuple[int, int, int, int, int]:
    if rows.hidden.dtype not in _DTYPES or rows.weights.dtype not in _DTYPES:
        raise ParallelError(
            f"hidden states are {rows.hidden.dtype} and router weights {rows.weights.dtype}; "
            "expert parallelism moves floats of 16, 32 or 64 bits"
        )
    return (
        rows.hidden.shape[1],
        rows.index.shape[1],
        _DTYPES.index(rows.hidden.dtype),
        _DTYPES.index(rows.weights.dtype),
        int(rows.index.dtype == torch.int64),
    )


def _empty_rows(shape: tuple[int, ...], device: torch.device) -> Rows:
    model_dim, top_k, hidden, weights, is_long = shape
    return Rows(
        torch.empty((0, model_dim), dtype=_DTYPES[hidden], device=device),
        torch.empty((0, top_k), dtype=torch.int64 if is_long else torch.int32, device=device),
        torch.empty((0, top_k), dtype=_DTYPES[weights], device=device),
    )
