"""Keeps what a model with offloaded experts does while it runs, in bounded memory."""

import gc
import itertools
import time
from collections import deque
from collections.abc import Collection
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from moe_runtime.cache.cache import ExpertCache
from moe_runtime.memory.read_watch import ReadWatch
from moe_runtime.memory.stream import Event, Stream
from moe_runtime.recording.busy_reads import BusyReads
from moe_runtime.recording.engine_watch import EngineWatch
from moe_runtime.recording.growing_bins import GrowingBins
from moe_runtime.recording.run_record import (
    COPY,
    DENSE,
    DISK,
    EXPERTS,
    GARBAGE,
    LANES,
    PLAN,
    WAIT,
    Forward,
    ForwardTotals,
    RunRecord,
    Span,
)
from moe_runtime.recording.visit_log import VisitLog

_FORWARD_BINS = 120
_TIME_BINS = 240
_FIRST_BIN_SECONDS = 0.002
NUM_SPANS = 6000  # of the last moments: some dozen forwards of a large model
_MAX_USES = 2**18  # of experts, in the first forwards: half a megabyte
_BYTES_ROW = len(LANES)
_DENSE, _EXPERTS, _PLAN, _WAIT, _DISK, _COPY, _GARBAGE = map(
    LANES.index, (DENSE, EXPERTS, PLAN, WAIT, DISK, COPY, GARBAGE)
)
_NO_FORWARDS = ForwardTotals(num_forwards=0, num_tokens=0, seconds=0.0)


class Watched(Protocol):
    """An engine, as far as a recorder knows it."""

    @property
    def cache(self) -> ExpertCache: ...

    def set_watch(self, watch: EngineWatch | None, reads: ReadWatch | None) -> None: ...


class RunRecorder:
    """While it is entered, forwards of `model` are recorded; `record()` says what they did.

    Outside of the `with` nothing listens, and nothing is paid for it. `device_stream` is where the
    engine's device computes, if it has one: copies are placed in time by an event recorded there.
    `num_spans` stretches of time at the end of the run are kept one by one, the rest in sums.
    """

    def __init__(
        self,
        model: nn.Module,
        engine: Watched,
        *,
        num_layers: int,
        device_stream: Stream | None = None,
        num_spans: int = NUM_SPANS,
    ) -> None:
        self._model = model
        self._engine = engine
        self._num_layers = num_layers
        self._device_stream = device_stream
        self._reads = BusyReads()
        self._by_forward = GrowingBins(2 * num_layers + 1, num_bins=_FORWARD_BINS, width=1.0)
        self._by_time = GrowingBins(len(LANES) + 1, num_bins=_TIME_BINS, width=_FIRST_BIN_SECONDS)
        self._lane_seconds = np.zeros(len(LANES))
        self._new: list[tuple[int, float, float]] = []  # lane, begin and end of spans
        self._spans: deque[tuple[int, float, float]] = deque(maxlen=num_spans)
        self._forwards: deque[Forward] = deque(maxlen=num_spans)
        self._first = VisitLog(_MAX_USES)
        self._num_forwards = 0
        self._totals = dict.fromkeys((False, True), _NO_FORWARDS)  # by whether it decodes
        self._zero = self._ended = 0.0
        self._zero_event: Event | None = None
        self._copies: list[tuple[Event, Event]] = []
        self._counted = [(0, 0)] * num_layers
        self._hooks: list[RemovableHandle] = []
        self._forward: tuple[float, int, bool] | None = None  # the one that runs
        self._collecting_since = 0.0
        self._free_since = 0.0  # no expert is computed since then
        self._pauses: list[tuple[int, float, float]] = []  # of the layer that runs

    def __enter__(self) -> "RunRecorder":
        assert not self._hooks, "entered twice"
        self._counted = self._counts()
        self._hooks = [
            self._model.register_forward_pre_hook(self._begin, with_kwargs=True),
            self._model.register_forward_hook(self._end),
        ]
        if self._device_stream is not None:
            self._zero_event = self._device_stream.record(is_timed=True)
            self._zero_event.wait()  # sync: once, to know when this is on the host's clock
        self._zero = time.perf_counter()
        self._engine.set_watch(self, self._reads)
        gc.callbacks.append(self._collected)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        gc.callbacks.remove(self._collected)
        self._engine.set_watch(None, None)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._ended = time.perf_counter()
        if self._copies:
            self._copies[-1][1].wait()  # sync: once
        self._drain()
        self._add_counts(max(0, self._num_forwards - 1))

    def planned(self, begin: float, end: float) -> None:
        self._pauses.append((_PLAN, begin, end))

    def waited(self, begin: float, end: float) -> None:
        self._pauses.append((_WAIT, begin, end))

    def visited(self, layer: int, experts: Collection[int], begin: float, end: float) -> None:
        pauses, self._pauses = self._pauses, []
        if self._forward is None:  # not called by the model that is watched
            return
        begin = min(begin, pauses[0][1]) if pauses else begin
        add = self._new.append
        add((_DENSE, self._free_since, begin))
        for lane, start, stop in pauses:
            add((_EXPERTS, begin, start))
            add((lane, start, stop))
            begin = stop
        add((_EXPERTS, begin, end))
        self._free_since = end
        self._first.add(layer, experts)

    def copied(self, start: Event, end: Event) -> None:
        self._copies.append((start, end))

    def record(self) -> RunRecord:
        """What the run did. Ask after the `with`."""
        layers, hits = self._num_layers, self._by_forward.sums
        forwards, since = self._recent()
        spans: dict[str, list[Span]] = {lane: [] for lane in LANES}
        for lane, begin, end in sorted(self._spans, key=lambda span: span[1]):
            if end - self._zero > since:
                spans[LANES[lane]].append((begin - self._zero, end - self._zero))
        return RunRecord(
            began_at=self._zero,
            seconds=self._ended - self._zero,
            prefill=self._totals[False],
            decode=self._totals[True],
            hits_LB=hits[:layers],
            misses_LB=hits[layers : 2 * layers],
            forward_seconds_B=hits[-1],
            forwards_per_bin=round(self._by_forward.width),
            lane_seconds=dict(zip(LANES, self._lane_seconds.tolist(), strict=True)),
            lane_seconds_S=dict(zip(LANES, self._by_time.sums, strict=False)),
            bytes_read_S=self._by_time.sums[_BYTES_ROW],
            bin_seconds=self._by_time.width,
            recent_forwards=forwards,
            recent_spans=spans,
            first=self._first.kept(),
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._first.drop()  # of a forward that failed
        self._pauses = []
        given = itertools.chain(args, kwargs.values())
        tokens = next((x for x in given if isinstance(x, torch.Tensor) and x.ndim > 1), None)
        num_sequences, num_new = (1, 1) if tokens is None else tokens.shape[:2]
        self._free_since = time.perf_counter()
        self._forward = self._free_since, num_sequences * num_new, num_new == 1

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _end(self, *_: Any) -> None:
        if self._forward is None:
            return
        (begin, num_tokens, is_decode), self._forward = self._forward, None
        end = time.perf_counter()
        self._new.append((_DENSE, self._free_since, end))
        forward = Forward(
            span=(begin - self._zero, end - self._zero),
            num_tokens=num_tokens,
            is_decode=is_decode,
        )
        self._forwards.append(forward)
        self._first.end(forward)
        self._totals[is_decode] = self._totals[is_decode].plus(forward)
        self._add_counts(self._num_forwards)
        self._by_forward.add(2 * self._num_layers, self._num_forwards, forward.seconds)
        self._num_forwards += 1
        self._drain()

    def _collected(self, phase: str, info: dict[str, int]) -> None:
        now = time.perf_counter()
        if phase == "start":
            self._collecting_since = now
        else:
            self._new.append((_GARBAGE, self._collecting_since, now))

    def _drain(self) -> None:
        """Take in what happened, here, in other threads, and on the device."""
        for begin, end, num_bytes in self._reads.take():
            self._new.append((_DISK, max(begin, self._zero), end))
            self._by_time.add(_BYTES_ROW, max(0.0, end - self._zero), num_bytes)
        waiting = []
        for start, end_event in self._copies:
            if not end_event.is_done():
                waiting.append((start, end_event))
            elif self._zero_event is not None:
                first = self._zero + start.seconds_since(self._zero_event)
                last = self._zero + end_event.seconds_since(self._zero_event)
                self._new.append((_COPY, first, last))
        self._copies = waiting
        new, self._new = self._new, []
        new = [span for span in new if span[2] > span[1]]
        if new:
            spans = np.array(new)
            lanes, begins, ends = spans[:, 0].astype(int), spans[:, 1], spans[:, 2]
            np.add.at(self._lane_seconds, lanes, ends - begins)
            self._by_time.add_spans(lanes, begins - self._zero, ends - self._zero)
            self._spans.extend(new)

    def _counts(self) -> list[tuple[int, int]]:
        counts = self._engine.cache.counts
        found = [counts.get(layer) for layer in range(self._num_layers)]
        return [(0, 0) if each is None else (each.hits, each.misses) for each in found]

    def _add_counts(self, position: int) -> None:
        """What the cache counted since the last time belongs to the forward at `position`."""
        before, self._counted = self._counted, self._counts()
        for layer, (old, new) in enumerate(zip(before, self._counted, strict=True)):
            if new[0] > old[0]:
                self._by_forward.add(layer, position, new[0] - old[0])
            if new[1] > old[1]:
                self._by_forward.add(self._num_layers + layer, position, new[1] - old[1])

    def _recent(self) -> tuple[list[Forward], float]:
        """Forwards of which every span is kept, and when the first of them began."""
        is_cut = len(self._spans) == self._spans.maxlen
        # Those of the device and of other threads come late, with the forward that they ran beside.
        oldest = max((end for _, _, end in itertools.islice(self._spans, 1)), default=0.0)
        kept = [f for f in self._forwards if not is_cut or f.span[0] + self._zero > oldest]
        return kept, kept[0].span[0] if kept else self._ended
