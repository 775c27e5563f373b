"""Rows of `bench parallel` for dispatchers that step decoder layers: by formula, and counted.

G ranks, N tokens of a batch, L MoE layers, E experts a layer, K top-k, D model dim.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moe_runtime.measure.bench.rank_traffic import DTYPE, Replay, TrafficRow
from moe_runtime.measure.bench.stepped_traffic import (
    ShuffledReplay,
    SteppedBytes,
    coherent_formula,
)
from moe_runtime.parallel.alltoall import AllToAllDispatcher
from moe_runtime.parallel.coherent import CoherentDispatcher
from moe_runtime.parallel.coherent_forward import CoherentForward
from moe_runtime.parallel.context import KVShape, SharedContext
from moe_runtime.parallel.dispatcher import Rows
from moe_runtime.parallel.expert_parallel import ExpertParallel
from moe_runtime.parallel.ledger import CONTROL, Ledger
from moe_runtime.parallel.plan import ExpertPlan
from moe_runtime.parallel.shuffled import ShuffledForward
from moe_runtime.parallel.waiting_ranks import WaitingRanks
from moe_runtime.parallel.world import World
from moe_runtime.placement.cocluster import DeviceTables
from moe_runtime.placement_map import Placement

Array = np.ndarray[Any, Any]

SLICES = "tensor attention, alltoall"
SHUFFLED = "tensor attention, speculative"
# A token's number stands in its first hidden numbers, in digits that bfloat16 holds exactly.
_BASE, NUM_DIGITS = 128, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepped:
    """What a replay needs beside routing."""

    kv_dim: int  # numbers that attention caches of a token in a layer
    tables: Mapping[str, DeviceTables]  # by placement
    token_id: Array  # [N], of the replay's tokens; -1 is unknown


def measure_stepped(
    ledger: Ledger,
    replay: Replay,
    placements: Mapping[str, Placement],
    stepped: Stepped,
    *,
    max_tokens: int,
    sent_tokens: int,
    yardsticks: Mapping[int, float],
    on_progress: Callable[[int, int], None],
) -> list[TrafficRow]:
    """As `measure_traffic`; `yardsticks` are bytes a token and layer, by tokens a rank."""
    found: list[TrafficRow] = []
    for size, yardstick in yardsticks.items():
        limit = max(sent_tokens, replay.num_ranks * size)
        for placement_name, placement in placements.items():
            plans = [ExpertPlan.of(placement, rank) for rank in range(replay.num_ranks)]
            node = np.arange(replay.num_ranks) * placement.nodes // replay.num_ranks
            leaves_node = node[:, None] != node
            tables = stepped.tables.get(placement_name)
            waiting = None
            if tables is not None:
                waiting = WaitingRanks.of(tables, plans[0], torch.device("cpu"))
            for name in (CoherentDispatcher.name, SLICES, SHUFFLED):
                if name == SHUFFLED and waiting is None:
                    continue
                one = _Dispatcher(
                    name=name,
                    replay=replay,
                    stepped=stepped,
                    plans=plans,
                    waiting=waiting,
                )
                total, pairs, tokens = one.formula(size, max_tokens)
                expected, _, _ = one.formula(size, limit)
                counted = one.count(ledger, size, limit)
                per = tokens * replay.topk.shape[1]
                whole = float((total.moe + total.around).sum())
                found.append(
                    TrafficRow(
                        placement=placement_name,
                        dispatcher=name,
                        tokens_per_rank=size,
                        tokens=tokens,
                        bytes_per_token_layer=whole / per,
                        bytes_between_nodes=float((total.moe + total.around)[leaves_node].sum())
                        / per,
                        ratio=whole / per / yardstick,
                        counted_bytes=counted,
                        counted_formula_bytes=int((expected.moe + expected.around).sum()),
                        moe_bytes_per_token_layer=float(total.moe.sum()) / per,
                        local_activation_rate=_rates(name, pairs),
                    )
                )
        on_progress(len(found), len(found))
    return found


def _rates(name: str, pairs: Array) -> dict[str, float | None] | None:
    """Shares of local pairs, where tokens wait on a rank for their experts."""
    if name == CoherentDispatcher.name:
        return None
    if name == SLICES:
        return {"all": float(pairs[:, 1].sum() / pairs[:, 0].sum())}
    return {
        name: float(local / every) if every else None
        for name, (every, local) in zip(("unseen", "seen"), pairs, strict=True)
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Dispatcher:
    """One of them under one placement."""

    name: str
    replay: Replay
    stepped: Stepped
    plans: list[ExpertPlan]
    waiting: WaitingRanks | None

    def formula(self, size: int, limit: int) -> tuple[SteppedBytes, Array, int]:
        """Bytes, pairs of `ShuffledReplay`, and the tokens that they are of."""
        replay, G = self.replay, self.replay.num_ranks
        moe, around = np.zeros((G, G), np.int64), np.zeros((G, G), np.int64)
        pairs = np.zeros((2, 2), np.int64)
        spans = replay.spans(size, limit)
        kv_bytes = self.stepped.kv_dim * DTYPE.itemsize
        shuffled = ShuffledReplay(plans=self.plans, waiting=self._tables(), row=replay.row)
        for span in spans:
            topk = replay.topk[span]
            if self.name == CoherentDispatcher.name:
                origin = np.repeat(np.arange(G), size)
                one = coherent_formula(self.plans, topk, origin, replay.row, kv_bytes)
            else:
                one, found = shuffled.run(topk, self.stepped.token_id[span])
                pairs += found
            moe += one.moe
            around += one.around
        return SteppedBytes(moe=moe, around=around), pairs, len(spans) * G * size

    def count(self, ledger: Ledger, size: int, limit: int) -> int:
        """Bytes that all ranks sent, by their ledgers, experts and attention left out."""
        counting = ledger.fresh()
        for span in self.replay.spans(size, limit):
            self._send(counting, span, size)
        mine = sum(
            sum(line.num_bytes) for layer, line in counting.sent().items() if layer != CONTROL
        )
        return sum(int(text) for text in ledger.gather_texts(str(mine)))

    def _tables(self) -> WaitingRanks | None:
        return self.waiting if self.name == SHUFFLED else None

    def _send(self, ledger: Ledger, span: slice, size: int) -> None:
        replay, plan = self.replay, self.plans[ledger.rank]
        world = World(ledger=ledger, hosts=("",) * replay.num_ranks, is_ours=False)
        parallel = ExpertParallel(world, plan, CoherentDispatcher.name)
        num_layers = replay.topk.shape[1]
        for _ in range(num_layers):
            parallel.attach(lambda hidden, *_: hidden)
        steps = _ReplaySteps(replay, span, self.stepped.kv_dim)
        hidden = steps.numbered(replay.num_ranks * size)
        if self.name == CoherentDispatcher.name:
            context = SharedContext([steps.kv_shape] * num_layers, ledger)
            forward = CoherentForward(parallel, CoherentDispatcher(plan, ledger), steps, context)
            mine = slice(ledger.rank * size, (ledger.rank + 1) * size)
            number = torch.arange(mine.start, mine.stop)
            back = forward.run(hidden[mine], number, torch.zeros_like(number))
            assert torch.equal(back, hidden[mine])
            return
        shuffled = ShuffledForward(
            parallel, AllToAllDispatcher(plan, ledger), steps.like, self._tables()
        )
        shuffled.begin(hidden, torch.from_numpy(self.stepped.token_id[span].astype(np.int64)))
        for layer in range(num_layers):
            here = steps.at(layer)
            hidden = shuffled.run_layer(layer, hidden, torch.zeros_like(hidden), here)
        shuffled.end()


class _ReplaySteps:
    """Decoder layers that route as the trace says and leave rows as they are."""

    def __init__(self, replay: Replay, span: slice, kv_dim: int) -> None:
        self._topk = torch.from_numpy(replay.topk[span].astype(np.int64))
        self._dim = replay.model_dim
        top_k = self._topk.shape[2]
        # The trace has experts in the order of weights; the first one's is the largest.
        self._weights = torch.arange(top_k, 0, -1).to(DTYPE)
        self.kv_shape = KVShape(key=(1, kv_dim - 1), value=(1, 1), dtype=DTYPE)
        self.like = Rows(
            torch.empty((0, self._dim), dtype=DTYPE),
            self._topk[:0, 0],
            torch.empty((0, top_k), dtype=DTYPE),
        )

    @property
    def num_layers(self) -> int:
        return self._topk.shape[1]

    def numbered(self, num_tokens: int) -> torch.Tensor:
        """`[N, D]`: rows that tell their numbers."""
        hidden = torch.zeros((num_tokens, self._dim), dtype=DTYPE)
        rest = torch.arange(num_tokens)
        for digit in range(NUM_DIGITS):
            hidden[:, digit] = (rest % _BASE).to(DTYPE)
            rest = rest // _BASE
        return hidden

    def moe_layer(self, layer: int) -> int | None:
        return layer

    def attend(
        self,
        layer: int,
        hidden_RD: torch.Tensor,
        position_R: torch.Tensor,
        visible_RP: torch.Tensor,
        context: SharedContext,
    ) -> torch.Tensor:
        assert bool(visible_RP.any(1).all())
        heads, size = self.kv_shape.key
        keys = torch.zeros((1, heads, len(hidden_RD), size), dtype=DTYPE)
        context.update(layer, keys, keys[..., :1])
        return hidden_RD

    def route(self, layer: int, hidden_RD: torch.Tensor) -> Rows:
        digits = hidden_RD[:, :NUM_DIGITS].long()
        number = (digits * _BASE ** torch.arange(NUM_DIGITS)).sum(1)
        return Rows(hidden_RD, self._topk[number, layer], self._weights.repeat(len(hidden_RD), 1))

    def expert_input(self, layer: int, hidden_RD: torch.Tensor) -> torch.Tensor:
        return hidden_RD

    def complete(
        self, layer: int, hidden_RD: torch.Tensor, experts_RD: torch.Tensor | None
    ) -> torch.Tensor:
        return hidden_RD

    def at(self, layer: int) -> Callable[[torch.Tensor, Callable[[Rows], Any]], torch.Tensor]:
        """The second half of one layer."""

        def second_half(hidden_RD: torch.Tensor, experts: Callable[[Rows], Any]) -> torch.Tensor:
            experts(self.route(layer, hidden_RD))
            return hidden_RD

        return second_half
