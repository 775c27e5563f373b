"""One model's experts on several ranks: keeps their forwards in step, layer by layer.

G ranks, T tokens of this rank, K top-k, D model dim.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from moe_runtime.errors import ParallelError
from moe_runtime.parallel.auto import AutoDispatcher
from moe_runtime.parallel.degree import Degree, FixedDegree
from moe_runtime.parallel.dispatcher import Rows
from moe_runtime.parallel.expected import ExpectedBytes
from moe_runtime.parallel.forward_step import Step, Wish, agree_on_step
from moe_runtime.parallel.local import LocalDispatcher
from moe_runtime.parallel.local_activations import LocalActivations
from moe_runtime.parallel.make_dispatcher import make_dispatcher
from moe_runtime.parallel.migrate import Migration, Stored, migrate
from moe_runtime.parallel.ordered_exchange import ComputeExperts, OrderedExchange, SumDtype
from moe_runtime.parallel.payload import ExactPayload, make_payload
from moe_runtime.parallel.pipeline import run_in_chunks
from moe_runtime.parallel.plan import ExpertPlan, check_placement
from moe_runtime.parallel.sent_report import sent_report
from moe_runtime.parallel.world import World
from moe_runtime.perf.interconnect import Interconnect
from moe_runtime.placement_map import Placement

_ONE_CHUNK = FixedDegree(1)
# What an experts module gets, `[T, D]`, where decoder layers are stepped from outside.
AnswerExperts = Callable[[int, Rows], torch.Tensor]


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
        network: Interconnect | None = None,
    ) -> None:
        self.world = world
        self._network = network
        self.dispatch = dispatch if world.num_ranks > 1 else LocalDispatcher.name
        self._asked_dispatch = dispatch
        self._payload = make_payload(payload)
        self._degree = degree
        self._num_chunks = 1  # of each layer of this forward
        self._num_steps_by_degree: Counter[int] = Counter()
        self._follow(plan)
        self._layers: list[ComputeExperts] = []
        self._sum_dtypes: list[SumDtype | None] = []
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
        self._wanted_after = 0
        self._stored: Stored | None = None
        self._num_moves = 0
        self.num_migrations = 0  # to other placements, so far
        self._is_together = True  # whether all ranks are known to stand at the same place
        self._is_closed = False

    def attach(self, compute: ComputeExperts, sum_dtype: SumDtype | None = None) -> int:
        """Add the next MoE layer; returns its number. A steady plan needs its `sum_dtype`."""
        assert sum_dtype is not None or not self.plan.is_steady
        self._layers.append(compute)
        self._sum_dtypes.append(sum_dtype)
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
        return self._step is not None and Wish.STOP in self._step.wishes

    def ask_to_stop(self) -> None:
        """Let every rank hear, at the next forward, that this one should end early."""
        self._wants_stop = True

    def ask_to_migrate(self, placement: str | Path | Placement, *, after_forwards: int = 0) -> None:
        """Go over to another placement when the next forward of any rank begins.

        Not before there have been `after_forwards` since loading.
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
        self._wanted_after = after_forwards

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
        chosen = None
        if isinstance(self.dispatcher, AutoDispatcher):
            chosen = dict(self.dispatcher.chosen)
        if chosen is not None and self._take_part is not None:
            chosen = {"coherent": self._num_steps * len(self._layers)}
        return {
            "rank": self.world.rank,
            "ranks": self.world.num_ranks,
            "nodes": self.plan.num_nodes,
            "dispatch": self.dispatch,
            "payload": self._payload.name,
            "chosen": chosen,
            "expected_bytes": None if self.expected is None else asdict(self.expected),
            "experts_held": self.plan.num_held,
            "forwards": self._num_steps,
            "forwards_by_chunks": {
                str(degree): count for degree, count in self._num_steps_by_degree.items() if count
            },
            "migrations": self.num_migrations,
            "experts_moved": self._num_moves,  # by all ranks
            "activations": self.activations.report(),
            **sent_report(self.world.ledger),
        }

    def _follow(self, plan: ExpertPlan) -> None:
        """From now on tokens go where `plan` says; with the bits of one process if it is steady."""
        self.plan = plan
        self.world.ledger.num_nodes = plan.num_nodes
        self.dispatcher = make_dispatcher(
            self._asked_dispatch, self.world, plan, self._payload, self._network
        )
        is_ordered = plan.is_steady and self.world.num_ranks > 1
        self._ordered = OrderedExchange(plan, self.world.ledger) if is_ordered else None

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
        """The next forward, behind a migration if any rank wants one."""
        wants_to_migrate = self._wanted is not None and self._num_steps >= self._wanted_after
        wishes = Wish.STOP * self._wants_stop | Wish.MIGRATE * wants_to_migrate
        step = agree_on_step(self.world.ledger, rows, num_extra=num_extra, wishes=Wish(wishes))
        if Wish.MIGRATE in step.wishes:
            self._migrate()
        self._step = step
        if not step.is_idle:
            row = step.empty.row_bytes(self._payload)
            top_k = step.empty.index.shape[1]
            self._num_chunks = self._degree.chunks(step.tokens_by_rank, row, top_k)
            self._num_steps_by_degree[self._num_chunks] += 1
            self._num_steps += 1
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
        rank, is_steady = self.world.rank, self.plan.is_steady
        self._follow(ExpertPlan.of(migration.after, rank, is_steady=is_steady))
        if isinstance(self.dispatcher, AutoDispatcher) and isinstance(before, AutoDispatcher):
            self.dispatcher.chosen = before.chosen
        self._num_moves += len(migration.moves)
        self.num_migrations += 1
        self._wanted = None

    def _run_layer(self, layer: int, rows: Rows, step: Step) -> torch.Tensor:
        compute, sum_dtype = self._layers[layer], self._sum_dtypes[layer]
        if self._ordered is not None and sum_dtype is not None:
            combined = self._ordered.run(layer, rows, compute, sum_dtype)
        else:
            combined = run_in_chunks(
                self.dispatcher,
                layer,
                rows,
                step.tokens_by_rank,
                lambda here: compute(here.hidden, here.index, here.weights),
                degree=self._num_chunks,
            )
        self._next_layer = (layer + 1) % len(self._layers)
        return combined
