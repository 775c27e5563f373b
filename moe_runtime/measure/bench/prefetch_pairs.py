"""Decodes the same tokens with prediction on and off, block by block in turn, and compares.

N rows of a trace, L MoE layers.
"""

import gc
import math
import statistics
import time
import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from moe_runtime.engine import EngineTimes, ExpertEngine
from moe_runtime.errors import PredictorError
from moe_runtime.foresight import Foresight, Gate
from moe_runtime.integrations.transformers.foresee import attach, piece_share
from moe_runtime.integrations.transformers.handle import Handle, handle
from moe_runtime.integrations.transformers.load import load
from moe_runtime.integrations.transformers.progress import quiet_transformers
from moe_runtime.measure.bench.oracle import Oracle
from moe_runtime.measure.bench.pairs_simulation import SimulatedBlocks, simulate_pairs
from moe_runtime.measure.contention import Contention
from moe_runtime.measure.probe.memory_rate import CpuMemoryRate, pool_bytes
from moe_runtime.measure.random_read import RandomReads
from moe_runtime.measure.replay_routing import RoutingReplay
from moe_runtime.memory.stream import Event
from moe_runtime.perf.step_cost import StepCost
from moe_runtime.predictors.live_gates import LiveGates
from moe_runtime.predictors.predictor import Fingerprint, Foreteller
from moe_runtime.predictors.store import load_predictor
from moe_runtime.scheduling.benefit import BenefitGate, ForwardFacts
from moe_runtime.trace import Trace

ORACLE = "oracle"
_CONTENTION_ROUNDS = 8
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
    simulated_hit_rate: float
    bytes_read: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """`ratio` is time on / time off, the geometric mean over pairs; `upper` its 95 % bound.

    The simulation knows `cost`, of which what is left of disk and compute beside each other was
    measured between the pairs, and all else in the blocks without prediction.
    """

    num_pairs: int
    num_tokens: int
    off: Side
    on: Side
    ratio: float
    upper: float
    simulated_ratio: float
    cost: StepCost
    prediction: dict[str, Any]


class _Contestant:
    """A model of its own, its place in the trace, and a switch for its prediction."""

    def __init__(self, request: PairsRequest) -> None:
        is_ours = request.predictor in ("auto", LiveGates.name)
        with quiet_transformers(lambda done, total: None), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few slots are the point
            self.model: PreTrainedModel = load(
                request.model,
                expert_memory=request.expert_memory,
                policy=request.policy,
                predictor=request.predictor if is_ours else "off",
                warm_start=False,
                device_map="cpu",
            )
        self.owner: Handle = handle(self.model)
        engine = self.owner.engine
        assert isinstance(engine, ExpertEngine), "on the CPU"
        self._engine = engine
        self._between = BetweenLayers()
        engine.set_watch(self._between, None)
        self.replay = RoutingReplay(self.model, request.trace)
        share = piece_share(self.owner)
        if not is_ours:
            gate = BenefitGate(share)
            foresight = Foresight(self._engine, _foreteller(request, self), gate)
            attach(self.model, self.owner, foresight)
        if self.owner.foresight is None:
            raise PredictorError(self.owner.report()["prediction"]["why"])
        inner = self.owner.foresight.gate if request.is_gated else OpenGate(share)
        self._switch = self.owner.foresight.gate = SwitchGate(inner)
        self._cache = DynamicCache(config=self.model.config)
        self._vocab = int(self.model.config.get_text_config().vocab_size)
        self._trace = request.trace

    @torch.no_grad()
    def run(self, first: int, count: int, *, is_on: bool) -> "_Counted":
        """Decode rows from `first` on, with prediction or without; returns what they took."""
        ids = _token_ids(self._trace, first, count, self._vocab)
        self._switch.is_open = is_on
        before = _Counted.of(self._engine, self._between)
        started = time.perf_counter()
        for token in ids:
            self.model(
                input_ids=torch.tensor([[token]]), past_key_values=self._cache, use_cache=True
            )
        seconds = time.perf_counter() - started
        found = _Counted.of(self._engine, self._between)
        found.add(before, -1)
        found.seconds = seconds
        return found


def run_pairs(request: PairsRequest, on_pair: Callable[[int, int], None]) -> Pairs:
    """Two instances warm up on the same rows, then take turns, each with prediction half the time.

    A pair is two blocks, of which each instance decodes one with prediction and one without: no two
    of them are equally fast (where their memory lies decides), and here that cancels.
    """
    with ExitStack() as stack:
        contention = _contention(Path(request.model), stack)
        sides = []
        for _ in range(2):
            side = _Contestant(request)
            stack.enter_context(closing(side.owner))
            sides.append(side)
        gc.collect()
        gc.disable()
        stack.callback(gc.enable)
        for side in sides:
            side.run(0, request.warm_tokens, is_on=True)
        totals = {is_on: _Counted() for is_on in (False, True)}
        logs = []
        for pair in range(request.num_pairs):
            on_pair(pair, request.num_pairs)
            if pair % max(1, request.num_pairs // _CONTENTION_ROUNDS) == 0:
                contention.sample()  # in between: a disk's rate drifts
            log = 0.0
            for block in range(2):
                first = request.warm_tokens + (2 * pair + block) * request.block_tokens
                for index in (0, 1) if pair % 2 == 0 else (1, 0):
                    is_on = index == block
                    found = sides[index].run(first, request.block_tokens, is_on=is_on)
                    totals[is_on].add(found)
                    log += math.log(found.seconds) * (1 if is_on else -1)
            logs.append(log / 2)
        prediction = sides[0].owner.report()["prediction"]
        num_tokens = 2 * request.num_pairs * request.block_tokens
        owner = sides[0].owner
        expert_bytes = owner.budget.slot_bytes
        cost = _cost(totals[False], num_tokens, contention, expert_bytes, piece_share(owner))
        simulated = simulate_pairs(
            request.trace,
            sides[0].owner.foresight,
            cost,
            policy=request.policy,
            num_layers=len(sides[0].owner.sites),
            num_slots=sides[0].owner.budget.num_slots,
            warm_tokens=request.warm_tokens,
            block_tokens=request.block_tokens,
            num_pairs=request.num_pairs,
        )
    mean = statistics.fmean(logs)
    error = statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else math.inf
    return Pairs(
        num_pairs=request.num_pairs,
        num_tokens=num_tokens,
        off=_side(totals[False], num_tokens, simulated[False]),
        on=_side(totals[True], num_tokens, simulated[True]),
        ratio=math.exp(mean),
        upper=math.exp(mean + _UPPER * error),
        simulated_ratio=simulated[True].seconds / simulated[False].seconds,
        cost=cost,
        prediction=prediction,
    )


class SwitchGate:
    """A gate that can be shut for a while, in which it learns nothing."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self.is_open = True

    @property
    def is_listening(self) -> bool:
        return self.is_open and self._gate.is_listening

    @property
    def is_on(self) -> bool:
        return self.is_open and self._gate.is_on

    @property
    def read_seconds(self) -> float:
        return self._gate.read_seconds

    @property
    def idle_seconds(self) -> float:
        return self._gate.idle_seconds

    def add(self, facts: ForwardFacts) -> None:
        if self.is_open:
            self._gate.add(facts)

    def fail(self, why: str) -> None:
        self._gate.fail(why)

    def report(self) -> dict[str, object]:
        return self._gate.report()


class OpenGate(BenefitGate):
    """Counts as the other does and never turns off: what reading ahead does where it loses."""

    @property
    def is_listening(self) -> bool:
        return True

    @property
    def is_on(self) -> bool:
        return True


class BetweenLayers:
    """Hears from an engine how long it takes from one layer's end to the next one's demand."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.count = 0
        self._last: tuple[int, float] | None = None

    def planned(self, begin: float, end: float) -> None:
        """Part of a layer."""

    def waited(self, begin: float, end: float) -> None:
        """Part of a layer."""

    def visited(self, layer: int, experts: Collection[int], begin: float, end: float) -> None:
        if self._last is not None and layer > self._last[0]:
            self.seconds += begin - self._last[1]
            self.count += 1
        self._last = layer, end

    def copied(self, start: Event, end: Event) -> None:
        """Nothing is copied on the CPU."""


@dataclass(slots=True)
class _Counted:
    seconds: float = 0.0
    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    between_seconds: float = 0.0  # from the end of a layer to the next one of the same forward
    num_between: int = 0
    times: EngineTimes = field(default_factory=EngineTimes)

    @classmethod
    def of(cls, engine: ExpertEngine, between: "BetweenLayers") -> "_Counted":
        counts = engine.cache.counts.values()
        return cls(
            hits=sum(count.hits for count in counts),
            misses=sum(count.misses for count in counts),
            bytes_read=engine.reader.bytes_read,
            between_seconds=between.seconds,
            num_between=between.count,
            times=engine.times.copy(),
        )

    def add(self, other: "_Counted", sign: int = 1) -> None:
        """Add what `other` counts, or take it away."""
        self.seconds += sign * other.seconds
        self.hits += sign * other.hits
        self.misses += sign * other.misses
        self.bytes_read += sign * other.bytes_read
        self.between_seconds += sign * other.between_seconds
        self.num_between += sign * other.num_between
        negative = EngineTimes().since(other.times)
        self.times = self.times.since(negative if sign > 0 else other.times)


def _side(counted: _Counted, num_tokens: int, simulated: SimulatedBlocks) -> Side:
    return Side(
        milliseconds=1e3 * counted.seconds / num_tokens,
        stall_milliseconds=1e3 * counted.times.stall_seconds / num_tokens,
        simulated_stall_milliseconds=1e3 * simulated.stall_seconds / num_tokens,
        simulated_milliseconds=1e3 * simulated.seconds / num_tokens,
        hit_rate=counted.hits / (counted.hits + counted.misses),
        simulated_hit_rate=simulated.hits / (simulated.hits + simulated.misses),
        bytes_read=counted.bytes_read,
    )


def _foreteller(request: PairsRequest, side: _Contestant) -> Foreteller:
    if request.predictor == ORACLE:
        num_layers = len(side.owner.sites)
        return Oracle(request.trace, num_layers, lambda: side.replay.position)
    # The replayed model's, not the checkpoint's, so its routing is what the predictor must fit.
    return load_predictor(Path(request.predictor), Fingerprint.of(request.trace))


def _contention(folder: Path, stack: ExitStack) -> Contention:
    """Of computing and reads of this model's files, until `stack` ends."""
    threads = torch.get_num_threads()
    reads = stack.enter_context(RandomReads(sorted(folder.glob("*.safetensors"))))
    memory = stack.enter_context(CpuMemoryRate(num_threads=threads, num_bytes=pool_bytes(threads)))
    return Contention(memory.pool, reads)


def _cost(
    counted: "_Counted", num_tokens: int, contention: Contention, expert_bytes: int, piece: float
) -> StepCost:
    """What the blocks without prediction took, and `contention` what reads and compute lose.

    What passed between two layers of experts is dense, inside and not waiting it is the experts';
    the rest of a token is outside its layers. A disk that serves bursts is faster for a demand
    after a pause than for reads without end: so a read ahead takes its own rate, not a share.
    """
    times = counted.times
    dense_seconds = counted.between_seconds / max(1, counted.num_between)
    outside_seconds = counted.seconds - times.inside_seconds - times.visits * dense_seconds
    read_seconds = times.fetch_seconds / max(1, times.fetched)
    return StepCost(
        dense_seconds=dense_seconds,
        outer_seconds=max(0.0, outside_seconds) / num_tokens,
        expert_seconds=(times.inside_seconds - times.stall_seconds)
        / (counted.hits + counted.misses),
        read_seconds=read_seconds,
        copy_seconds=0.0,
        piece_seconds=piece * read_seconds,
        compute_share=contention.result().compute_share,
        read_share=min(1.0, contention.read_gbps * 1e9 * read_seconds / expert_bytes),
    )


def _token_ids(trace: Trace, first: int, count: int, vocab: int) -> Sequence[int]:
    rows = np.arange(first, first + count) % trace.num_tokens
    if trace.token_id is None:
        found: list[int] = (rows * 7919 % vocab).tolist()
        return found
    known: list[int] = (np.maximum(trace.token_id[rows], 0) % vocab).tolist()
    return known
