"""Plays what two instances ran in turns, with prediction and without, on the simulator's lanes.

N rows of a trace, L MoE layers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from moe_runtime.cache.predictions import Predictions
from moe_runtime.foresight import Foresight
from moe_runtime.measure.bench.oracle import Oracle
from moe_runtime.perf.step_cost import StepCost
from moe_runtime.predictors.live_gates import LiveGates
from moe_runtime.predictors.predictor import Foreteller
from moe_runtime.simulate.accesses import Accesses
from moe_runtime.simulate.advice import advice
from moe_runtime.simulate.policy_maker import PolicyMaker
from moe_runtime.simulate.timeline import Playback, Timeline
from moe_runtime.trace import Trace


@dataclass(slots=True)
class SimulatedBlocks:
    """What all blocks with prediction, or all without, would have taken."""

    seconds: float = 0.0
    compute_seconds: float = 0.0
    hits: int = 0
    misses: int = 0

    @property
    def stall_seconds(self) -> float:
        """Compute waits for experts so long."""
        return self.seconds - self.compute_seconds

    def add(self, before: Timeline, after: Timeline) -> None:
        """Add what passed between two results."""
        self.seconds += after.seconds - before.seconds
        self.compute_seconds += after.compute_seconds - before.compute_seconds
        self.hits += after.hits - before.hits
        self.misses += after.misses - before.misses


def simulate_pairs(
    trace: Trace,
    foresight: Foresight | None,
    cost: StepCost,
    *,
    policy: str,
    num_layers: int,
    num_slots: int,
    warm_tokens: int,
    block_tokens: int,
    num_pairs: int,
) -> dict[bool, SimulatedBlocks]:
    """By whether prediction was on. Blocks without it find what others have left in the cache.

    Both instances run the warm tokens with prediction, then each every other block.
    """
    rows = np.arange(warm_tokens + 2 * num_pairs * block_tokens) % trace.num_tokens
    part = _rows(trace, rows, num_layers)
    accesses = Accesses.of(part)
    maker = PolicyMaker(
        accesses, policies=[policy], slots=[num_slots], policy_accesses=None, queue=None
    )
    found = {is_on: SimulatedBlocks() for is_on in (False, True)}
    for index in (0, 1):
        playback = Playback(maker.make(policy, num_slots), num_slots, cost)
        told = _told(_fresh(foresight, part), part)
        visits = zip(accesses.visits(), told, strict=True)
        blocks = [(warm_tokens, True)]
        blocks += [(block_tokens, index == block % 2) for block in range(2 * num_pairs)]
        for number, (num_tokens, is_on) in enumerate(blocks):
            before = playback.result()
            for _ in range(num_tokens * num_layers):
                keys, said = next(visits)
                is_heard = is_on and said is not None
                playback.visit(keys, said if is_on else None, is_prefetching=is_heard)
            if number:
                found[is_on].add(before, playback.result())
    return found


def _told(predictor: Foreteller | None, trace: Trace) -> Iterator[Predictions | None]:
    """What `predictor` says after each visit of a row in a layer."""
    if predictor is not None:
        yield from advice(predictor, trace)
        return
    for _ in range(trace.num_tokens * trace.num_layers):
        yield None


def _fresh(foresight: Foresight | None, trace: Trace) -> Foreteller | None:
    """The predictor before it ran, along `trace`; None where the trace lacks what it looks at."""
    if foresight is None:
        return None
    predictor = foresight.predictor
    if isinstance(predictor, Oracle):
        return _RowByRow(predictor)
    if "hidden" in predictor.needs and trace.hidden is None:
        return None
    if isinstance(predictor, LiveGates):
        return LiveGates(predictor.fingerprint, predictor.gates)
    return predictor


class _RowByRow:
    """An oracle that goes along a trace from its top."""

    name: ClassVar[str] = Oracle.name
    needs: ClassVar[frozenset[str]] = Oracle.needs

    def __init__(self, oracle: Oracle) -> None:
        self._oracle = oracle
        self.fingerprint = oracle.fingerprint

    def start(self) -> Any:
        self._oracle.position = iter(range(2**62)).__next__
        return self._oracle.start()


def _rows(trace: Trace, rows: Any, num_layers: int) -> Trace:
    fields: dict[str, Any] = {"topk": trace.topk[rows][:, :num_layers], "model": trace.model}
    if trace.hidden is not None:
        fields["hidden"] = trace.hidden[rows][:, :num_layers]
    return Trace.of(fields, source="replayed rows", num_experts=trace.num_experts)
