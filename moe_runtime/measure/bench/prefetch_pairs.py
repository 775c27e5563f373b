"""Decodes the same tokens with prediction on and off, block by block in turn, and compares.

N rows of a trace, L MoE layers.
"""

import gc
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from moe_runtime.engine import EngineTimes
from moe_runtime.foresight import Foresight
from moe_runtime.integrations.transformers.foresee import attach
from moe_runtime.integrations.transformers.handle import Handle, handle
from moe_runtime.integrations.transformers.load import load
from moe_runtime.integrations.transformers.progress import quiet_transformers
from moe_runtime.measure.bench.oracle import Oracle
from moe_runtime.measure.replay_routing import RoutingReplay
from moe_runtime.memory.disk import CHUNK_BYTES
from moe_runtime.perf.step_cost import StepCost
from moe_runtime.predictors.live_gates import LiveGates
from moe_runtime.predictors.predictor import Fingerprint, Foreteller
from moe_runtime.predictors.store import load_predictor
from moe_runtime.scheduling.benefit import BenefitGate
from moe_runtime.simulate.accesses import Accesses
from moe_runtime.simulate.advice import advice
from moe_runtime.simulate.policy_maker import PolicyMaker
from moe_runtime.simulate.timeline import Timeline, play
from moe_runtime.trace import Trace

ORACLE = "oracle"
_UPPER = 1.645  # of a normal distribution: one side, 95 %


@dataclass(frozen=True, slots=True, kw_only=True)
class PairsRequest:
    """What to compare. `trace` holds the rows that both replay, in order; `predictor` is load()'s,
    a file fitted to the trace's model, or 'oracle'."""

    model: str
    trace: Trace
    predictor: str
    expert_memory: str
    policy: str
    num_pairs: int
    block_tokens: int
    warm_tokens: int
    is_gated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two, over all counted blocks."""

    milliseconds: float  # a token
    stall_milliseconds: float
    simulated_stall_milliseconds: float
    simulated_milliseconds: float
    hit_rate: float
    bytes_read: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """`ratio` is time on / time off, the geometric mean over pairs; `upper` its 95 % bound."""

    num_pairs: int
    num_tokens: int
    off: Side
    on: Side
    ratio: float
    upper: float
    simulated_ratio: float
    prediction: dict[str, Any]


class _Contestant:
    """A model of its own, its place in the trace, and what its blocks took."""

    def __init__(self, request: PairsRequest, predictor: str) -> None:
        with quiet_transformers(lambda done, total: None), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few slots are the point
            self.model: PreTrainedModel = load(
                request.model,
                expert_memory=request.expert_memory,
                policy=request.policy,
                predictor=predictor,
                warm_start=False,
            )
        self.owner: Handle = handle(self.model)
        self.replay = RoutingReplay(self.model, request.trace)
        self._cache = DynamicCache(config=self.model.config)
        self._vocab = int(self.model.config.get_text_config().vocab_size)
        self._trace = request.trace

    @torch.no_grad()
    def run(self, first: int, count: int) -> float:
        """Decode rows from `first` on; returns seconds."""
        ids = _token_ids(self._trace, first, count, self._vocab)
        started = time.perf_counter()
        for token in ids:
            self.model(
                input_ids=torch.tensor([[token]]), past_key_values=self._cache, use_cache=True
            )
        return time.perf_counter() - started


def run_pairs(request: PairsRequest, on_pair: Callable[[int, int], None]) -> Pairs:
    """Both warm up on the same rows, then take turns, who begins changing from block to block."""
    is_special = request.predictor not in ("auto", "gate_lookahead")
    with ExitStack() as stack:
        sides = []
        for predictor in ("off", "off" if is_special else request.predictor):
            side = _Contestant(request, predictor)
            stack.enter_context(closing(side.owner))
            sides.append(side)
        off, on = sides
        if is_special:
            piece_share = min(1.0, CHUNK_BYTES / on.owner.budget.slot_bytes)
            gate = BenefitGate(piece_share) if request.is_gated else OpenGate(piece_share)
            foresight = Foresight(on.owner.engine, _foreteller(request, on), gate)
            attach(on.model, on.owner, foresight)
        gc.collect()
        gc.disable()
        stack.callback(gc.enable)
        for side in sides:
            side.run(0, request.warm_tokens)
        before = [_Counted.of(side) for side in sides]
        seconds: tuple[list[float], list[float]] = ([], [])
        for pair in range(request.num_pairs):
            on_pair(pair, request.num_pairs)
            first = request.warm_tokens + pair * request.block_tokens
            for index in (0, 1) if pair % 2 == 0 else (1, 0):
                seconds[index].append(sides[index].run(first, request.block_tokens))
        after = [_Counted.of(side) for side in sides]
        prediction = on.owner.report()["prediction"]
        num_tokens = request.num_pairs * request.block_tokens
        done = [b.since(a) for a, b in zip(before, after, strict=True)]
        simulated = _simulate(request, off, on, done[0], sum(seconds[0]) / num_tokens)
    measured = [
        _side(counted, sum(of), num_tokens, timeline)
        for counted, of, timeline in zip(done, seconds, simulated, strict=True)
    ]
    logs = [math.log(b / a) for a, b in zip(*seconds, strict=True)]
    mean = statistics.fmean(logs)
    error = statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else math.inf
    return Pairs(
        num_pairs=request.num_pairs,
        num_tokens=num_tokens,
        off=measured[0],
        on=measured[1],
        ratio=math.exp(mean),
        upper=math.exp(mean + _UPPER * error),
        simulated_ratio=simulated[1].seconds / simulated[0].seconds,
        prediction=prediction,
    )


class OpenGate(BenefitGate):
    """Counts as the other does and never turns off: what reading ahead does where it loses."""

    @property
    def is_listening(self) -> bool:
        return True

    @property
    def is_on(self) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class _Counted:
    hits: int
    misses: int
    bytes_read: int
    times: EngineTimes

    @classmethod
    def of(cls, side: _Contestant) -> "_Counted":
        engine = side.owner.engine
        times = engine.times
        counts = engine.cache.counts.values()
        return cls(
            sum(count.hits for count in counts),
            sum(count.misses for count in counts),
            engine.reader.bytes_read,
            times.since(EngineTimes()),
        )

    def since(self, other: "_Counted") -> "_Counted":
        return _Counted(
            self.hits - other.hits,
            self.misses - other.misses,
            self.bytes_read - other.bytes_read,
            self.times.since(other.times),
        )


def _side(counted: _Counted, seconds: float, num_tokens: int, simulated: Timeline) -> Side:
    return Side(
        milliseconds=1e3 * seconds / num_tokens,
        stall_milliseconds=1e3 * counted.times.stall_seconds / num_tokens,
        simulated_stall_milliseconds=1e3 * simulated.stall_seconds / num_tokens,
        simulated_milliseconds=1e3 * simulated.seconds / num_tokens,
        hit_rate=counted.hits / (counted.hits + counted.misses),
        bytes_read=counted.bytes_read,
    )


def _foreteller(request: PairsRequest, side: _Contestant) -> Foreteller:
    if request.predictor == ORACLE:
        num_layers = len(side.owner.sites)
        return Oracle(request.trace, num_layers, lambda: side.replay.position)
    # The replayed model's, not the checkpoint's, so its routing is what the predictor must fit.
    return load_predictor(Path(request.predictor), Fingerprint.of(request.trace))


def _simulate(
    request: PairsRequest, off: _Contestant, on: _Contestant, counted: _Counted, seconds: float
) -> list[Timeline]:
    """The counted rows on lanes, off and on, with what the run without prediction took.

    `seconds` of a token: outside the experts' layers they are dense, inside and not waiting they
    are the experts'.
    """
    times = counted.times
    visits_a_token = times.visits / (request.num_pairs * request.block_tokens)
    cost = StepCost(
        dense_seconds=seconds / visits_a_token - times.inside_seconds / times.visits,
        expert_seconds=(times.inside_seconds - times.stall_seconds)
        / (counted.hits + counted.misses),
        read_seconds=times.fetch_seconds / max(1, times.fetched),
        copy_seconds=0.0,
    )
    num_layers = len(off.owner.sites)
    num_rows = request.warm_tokens + request.num_pairs * request.block_tokens
    rows = np.arange(num_rows) % request.trace.num_tokens
    trace = _rows(request.trace, rows, num_layers)
    slots = off.owner.budget.num_slots
    parts = [trace, _rows(request.trace, rows[: request.warm_tokens], num_layers)]
    timelines = []
    for is_on in (False, True):
        played = []
        for part in parts:
            accesses_of = Accesses.of(part)
            maker = PolicyMaker(
                accesses_of,
                policies=[request.policy],
                slots=[slots],
                policy_accesses=None,
                queue=None,
            )
            told = _fresh(on.owner.foresight, part) if is_on else None
            played.append(
                play(
                    accesses_of.visits(),
                    maker.make(request.policy, slots),
                    slots,
                    cost,
                    advice=None if told is None else advice(told, part),
                    is_prefetching=told is not None,
                )
            )
        timelines.append(_difference(*played))
    return timelines


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


def _difference(whole: Timeline, start: Timeline) -> Timeline:
    return Timeline(
        seconds=whole.seconds - start.seconds,
        compute_seconds=whole.compute_seconds - start.compute_seconds,
        disk_seconds=whole.disk_seconds - start.disk_seconds,
        copy_seconds=whole.copy_seconds - start.copy_seconds,
        hits=whole.hits - start.hits,
        misses=whole.misses - start.misses,
        prefetches=whole.prefetches - start.prefetches,
        wasted=whole.wasted - start.wasted,
        num_steps=whole.num_steps - start.num_steps,
    )


def _token_ids(trace: Trace, first: int, count: int, vocab: int) -> Sequence[int]:
    rows = np.arange(first, first + count) % trace.num_tokens
    if trace.token_id is None:
        found: list[int] = (rows * 7919 % vocab).tolist()
        return found
    known: list[int] = (np.maximum(trace.token_id[rows], 0) % vocab).tolist()
    return known
