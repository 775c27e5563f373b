"""A predictor at work beside a running model: hears of routing, says what to read ahead.

T rows of a forward, K experts a token, D model dim.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch

from moe_runtime.cache.cache import ExpertCache
from moe_runtime.cache.predictions import Predictions
from moe_runtime.engine import EngineTimes, Progress
from moe_runtime.expert import ExpertKey
from moe_runtime.predictors.predictor import Foreteller, StepRows
from moe_runtime.scheduling.adviser import Adviser
from moe_runtime.scheduling.benefit import ForwardFacts
from moe_runtime.scheduling.prefetch import (
    AheadPlan,
    Forecaster,
    PrefetchCounts,
    reads_that_fit,
)

logger = logging.getLogger("moe_runtime")

_MOST_ROWS = 16  # of a forward that the gate learns from: a prompt is no measure of a token


class Gate(Protocol):
    """Decides whether the predictor speaks, and whether what it says is read."""

    @property
    def is_listening(self) -> bool: ...

    @property
    def is_on(self) -> bool: ...

    @property
    def read_seconds(self) -> float: ...

    @property
    def idle_seconds(self) -> float: ...

    def add(self, facts: ForwardFacts) -> None: ...

    def fail(self, why: str) -> None: ...

    def report(self) -> dict[str, object]: ...


class AheadReader(Protocol):
    """What reads ahead of need: an engine, or the tiers below a device."""

    @property
    def cache(self) -> ExpertCache: ...

    @property
    def num_ahead(self) -> int: ...

    def read_ahead(self, plan: AheadPlan) -> None: ...

    def start_clock(self) -> None: ...

    def progress(self) -> Progress: ...

    def since(self, before: Progress) -> tuple[EngineTimes, PrefetchCounts]: ...

    def ahead_report(self) -> dict[str, Any]: ...


class Foresight:
    """Told of each forward as it runs: `begin`, for each layer `saw` and `routed`, `end`.

    The router stays authoritative: whatever the predictor says, or raises, only changes what is in
    slots when a layer asks. Other threads than the one that began a forward are not heard.
    """

    def __init__(
        self,
        reader: AheadReader,
        predictor: Foreteller,
        gate: Gate,
        *,
        clock: Callable[[], float] = time.perf_counter,
        own_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        self.predictor = predictor
        self.gate = gate
        self._reader = reader
        self._clock = clock
        self._own_clock = own_clock  # what disk threads take meanwhile is not the predictor's
        self._num_experts = predictor.fingerprint.num_experts
        self._forecaster = Forecaster(reader.cache)
        self._needs_hidden = "hidden" in predictor.needs
        self._adviser: Adviser | None = None
        self._thread: int | None = None  # of the forward that runs; None: nobody listens
        self._num_rows = 0
        self._hidden: tuple[int, torch.Tensor] | None = None  # of the layer that routes
        self._predictor_seconds = 0.0
        self._began = 0.0
        self._before = reader.progress()
        self._trial: dict[int, dict[ExpertKey, None]] = {}  # by layer, what would be on its way
        self._trial_counts = PrefetchCounts()

    @property
    def is_listening(self) -> bool:
        """Whether `saw` and `routed`, and the rows of a forward, are of any use."""
        return self.gate.is_listening

    def begin(self, num_rows: int, rows: Callable[[], StepRows]) -> None:
        """A forward of so many rows starts; `rows` are asked for while somebody listens."""
        self._thread, self._hidden = None, None
        self._num_rows = num_rows
        self._began = self._clock()
        self._predictor_seconds = 0.0
        self._before = self._reader.progress()
        self._trial.clear()
        self._trial_counts = PrefetchCounts()
        self._reader.start_clock()
        if not self.gate.is_listening:
            self._adviser = None
            return
        self._thread = threading.get_ident()
        if self._adviser is None:
            self._adviser = Adviser(self.predictor)
        adviser = self._adviser
        self._ask(lambda: adviser.begin(rows()), layer=-1)
        plan = self.plan(self._reader.num_ahead)
        if plan is not None:
            self._reader.read_ahead(plan)

    def saw(self, layer: int, hidden: torch.Tensor) -> None:
        """The router of `layer` is given `hidden` `[..., D]`."""
        if self._needs_hidden and self._thread is not None:
            self._hidden = layer, hidden

    def routed(self, layer: int, topk_TK: torch.Tensor) -> None:
        """It chose `topk_TK`; the layer's demand comes next."""
        adviser = self._adviser
        if self._thread != threading.get_ident() or adviser is None:
            return
        seen, self._hidden = self._hidden, None
        topk = topk_TK.cpu().numpy().astype(np.int16)
        topk[topk >= self._num_experts] = -1  # rows of other ranks
        hidden = None
        if seen is not None and seen[0] == layer:
            flat = seen[1].detach().reshape(-1, seen[1].shape[-1])
            hidden = flat.float().cpu().numpy()  # sync: the host predicts
        self._judge_trial(layer, topk)
        self._ask(lambda: adviser.observe(layer, topk, hidden), layer=layer)

    def plan(self, num_in_line: int) -> AheadPlan | None:
        """What to read while the disk has nothing that is demanded."""
        if self._thread != threading.get_ident():
            return None
        most = reads_that_fit(self.gate.idle_seconds, self.gate.read_seconds) - num_in_line
        if most <= 0:
            return None
        started = self._own_clock()
        keys = self._forecaster.wanted()[:most]
        self._predictor_seconds += self._own_clock() - started
        if not self.gate.is_on:
            for key in keys:
                self._trial.setdefault(key.layer, {})[key] = None
            return None
        return AheadPlan(keys, most, self._forecaster.is_worth) if keys else None

    def end(self) -> None:
        """The forward is over."""
        self._thread = None
        if self._num_rows > _MOST_ROWS:
            return
        times, counts = self._reader.since(self._before)
        self.gate.add(
            ForwardFacts(
                num_visits=times.visits,
                seconds=self._clock() - self._began,
                predictor_seconds=self._predictor_seconds,
                stall_seconds=times.stall_seconds,
                idle_seconds=times.idle_seconds,
                read_seconds=times.fetch_seconds / times.fetched if times.fetched else None,
                counts=counts if self.gate.is_on else self._trial_counts,
            )
        )

    def report(self) -> dict[str, Any]:
        """`prediction` of the handle's report; reads ahead are counted since loading."""
        return {
            "predictor": self.predictor.name,
            **self.gate.report(),
            **self._reader.ahead_report(),
        }

    def _ask(self, said: Callable[[], Predictions], *, layer: int) -> None:
        """Tell the cache what the predictor says; one that fails is never asked again."""
        started = self._own_clock()
        try:
            self._forecaster.advise(said(), layer)
        except Exception as error:  # a wrong predictor must cost time at most
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self.gate.fail(f"predictor {self.predictor.name} failed: {reason}")
            logger.warning("predictor %s failed, reading ahead is off: %s",
                           self.predictor.name, reason)  # fmt: skip
            self._thread = self._adviser = None
        self._predictor_seconds += self._own_clock() - started

    def _judge_trial(self, layer: int, topk: np.ndarray[Any, Any]) -> None:
        planned = self._trial.pop(layer, None)
        if planned:
            demanded = set(topk.ravel().tolist())
            right = sum(key.expert in demanded for key in planned)
            self._trial_counts.hidden += right
            self._trial_counts.wasted += len(planned) - right
