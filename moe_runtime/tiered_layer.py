"""Computes the experts of one layer where they are cheapest: on the device, or on the CPU."""

import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moe_runtime.expert import ExpertKey
from moe_runtime.foresight import Foresight
from moe_runtime.layer import Dispatch, LayerMath
from moe_runtime.memory.stream import Event, Stream
from moe_runtime.scheduling.miss_plan import Miss, MissPlan, MissWay
from moe_runtime.tiered_access import HostAccess, TieredAccess
from moe_runtime.tiered_engine import TieredEngine
from moe_runtime.tiered_math import DeviceRows, GroupedKernel, TieredMath
from moe_runtime.torch_rows import TorchRows

# T tokens, K top-k, E experts, D model dim, n rows of some experts

# With more tokens the inputs are not brought to the host: an expert has so many rows then that no
# CPU computes it in the time of its copy.
_MAX_HOST_TOKENS = 256


class TieredLayers:
    """Runs layers through a TieredEngine, with the miss plan, and learns from what they took.

    One host sync a layer, to read the routing; none where the device holds every expert of the
    layer, a grouped kernel finds them through a table of slots and no predictor listens: the host
    then learns of the routing when it next waits for something else.

    An output does not depend on what was cached, with one exception: an expert that the CPU
    computed differs from the device's in rounding. Rows are summed in one order, whoever made them.
    """

    def __init__(self, engine: TieredEngine) -> None:
        self._engine = engine
        self.foresight: Foresight | None = None
        self._planner = engine.planner
        self._measured: deque[_Measurement] = deque()

    def run(
        self,
        layer: int,
        math: TieredMath,
        hidden_TD: torch.Tensor,
        top_k_index_TK: torch.Tensor,
        top_k_weights_TK: torch.Tensor,
    ) -> torch.Tensor:
        """Sum of weighted expert outputs, `[T, D]` in the dtype of `hidden_TD`."""
        if not top_k_index_TK.numel():
            return torch.zeros_like(hidden_TD)
        inputs = _Inputs(hidden_TD, top_k_index_TK, top_k_weights_TK)
        with self._engine.open_layer(layer) as access:
            is_heard = self.foresight is not None and self.foresight.is_listening
            if math.grouped is not None and not is_heard:
                slots_E = self._engine.slot_table(layer, access.compute)
                if slots_E is not None:
                    return self._run_resident(access, math.grouped, inputs, slots_E)
            return self._run_tiers(access, math, inputs)

    def _run_resident(
        self, access: TieredAccess, kernel: GroupedKernel, inputs: "_Inputs", slots_E: torch.Tensor
    ) -> torch.Tensor:
        engine, layer = self._engine, access.layer
        stacked = engine.device_slots.stacked(engine.tensor_map.layers[layer].layout)
        total_TD = torch.empty_like(inputs.hidden_TD)
        used_E = torch.empty(len(slots_E), dtype=torch.uint8, device=slots_E.device)

        def run() -> None:
            output_TD, counts_E = kernel.run(*inputs.tensors, stacked, slots_E)
            total_TD.copy_(output_TD)
            used_E.copy_(counts_E > 0)

        access.use_resident()
        access.compute.launch(run)
        engine.note_use(layer, used_E, access.compute)
        return total_TD

    def _run_tiers(self, access: TieredAccess, math: TieredMath, inputs: "_Inputs") -> torch.Tensor:
        engine, layer = self._engine, access.layer
        num_experts = engine.tensor_map.layers[layer].num_experts
        way = self._planner.way
        can_compute = math.host is not None and (
            way is MissWay.CPU
            or (way is MissWay.AUTO and len(inputs.hidden_TD) <= _MAX_HOST_TOKENS)
        )
        on_host = _OnHost.begin(engine, access.compute, inputs, with_hidden=can_compute)
        rows = self._rows(access, math, inputs)
        rows.sort(access.compute)  # while the host waits
        engine.wait(on_host.read)  # sync: the host must know which experts to bring
        counts = on_host.counts(num_experts)
        if self.foresight is not None:
            self.foresight.routed(layer, on_host.index_TK)
        self._learn()
        misses = [
            Miss(expert, count, not engine.is_on_host(key))
            for expert, count in enumerate(counts)
            if count and (key := ExpertKey(layer, expert)) not in engine.cache
        ]
        missing = {miss.expert for miss in misses}
        needed = [expert for expert in range(num_experts) if counts[expert]]
        held = [expert for expert in needed if expert not in missing]
        plan = self._planner.plan(misses, [counts[e] for e in held], can_compute=can_compute)
        computed = [miss.expert for miss in plan.computed]
        stall_seconds = self._planner.stall_seconds(plan, [counts[e] for e in needed])
        engine.ahead.demanded(plan, stall_seconds)
        access.need(needed, computed=computed, order=plan.order)
        rows.place(counts, access.device_slots, access.compute)
        _Run(self, engine, access, math.host, rows, on_host, counts).go(held, plan)
        total_TD = torch.empty_like(inputs.hidden_TD)
        rows.combine(total_TD, access.compute)
        engine.counts.num_computed += len(computed)
        if plan.seconds:
            end = access.compute.record(is_timed=True)
            self.measure(lambda seconds: self._planner.observe(plan, seconds), on_host.read, end)
        for copy in access.copies:
            self.measure(self._planner.costs.copy.add, copy.start, copy.end)
        return total_TD

    def _rows(self, access: TieredAccess, math: TieredMath, inputs: "_Inputs") -> DeviceRows:
        engine, slots = self._engine, self._engine.device_slots
        if math.grouped is not None:
            stacked = slots.stacked(engine.tensor_map.layers[access.layer].layout)
            return math.grouped.rows(*inputs.tensors, stacked)
        layout = engine.device_layout(access.layer)
        return TorchRows(math.torch_math, slots, layout, *inputs.tensors)

    def report(self) -> dict[str, Any]:
        """`tiers` of `generate --json`. Waits for routing that the device has not told yet."""
        engine, costs = self._engine, self._planner.costs
        with engine.turn:
            if not engine.is_closed:
                with engine.deciding():
                    engine.read_use_log()
        counts, host = engine.counts, engine.host_cache.counts.values()
        hits, misses = sum(c.hits for c in host), sum(c.misses for c in host)
        slot_bytes = engine.host_slots.slot_bytes
        return {
            "miss": str(self._planner.way),
            "misses_copied": counts.num_copied,
            "misses_computed": counts.num_computed,
            "prefetched": counts.num_prefetched,
            "bytes_copied": counts.copied_bytes,
            "layers": counts.num_layers,
            "syncs": counts.num_syncs,
            "syncs_per_layer": counts.num_syncs / counts.num_layers if counts.num_layers else None,
            "host_slots": engine.host_slots.num_slots,
            "host_bytes": engine.host_slots.num_slots * slot_bytes,
            "host_pinned": engine.host_slots.refusal is None,
            "host_hits": hits,
            "host_misses": misses,
            "host_hit_rate": hits / (hits + misses) if hits + misses else None,
            "seconds_per_copy": costs.copy.value if costs.copy.num_samples else None,
            "seconds_per_read": costs.read.value if costs.read.num_samples else None,
        }

    def measure(self, learn: Callable[[float], object], start: Event, end: Event) -> None:
        """Hand the seconds between two events to `learn`, once both are done."""
        self._measured.append(_Measurement(learn, start, end))

    def _learn(self) -> None:
        while self._measured and self._measured[0].end.is_done():
            done = self._measured.popleft()
            done.learn(done.end.seconds_since(done.start))


@dataclass(frozen=True, slots=True)
class _Measurement:
    learn: Callable[[float], object]
    start: Event
    end: Event


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What the model hands to its experts."""

    hidden_TD: torch.Tensor
    index_TK: torch.Tensor
    weights_TK: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.hidden_TD, self.index_TK, self.weights_TK


@dataclass(frozen=True, slots=True)
class _OnHost:
    """What the host learns of a layer once `read` is done: routing, and inputs if asked for."""

    index_TK: torch.Tensor
    hidden_TD: torch.Tensor | None
    read: Event

    @classmethod
    def begin(
        cls, engine: TieredEngine, compute: Stream, inputs: _Inputs, *, with_hidden: bool
    ) -> "_OnHost":
        """Queue the copies."""
        index = inputs.index_TK
        index_TK = engine.buffers["routing"].tensor(index.shape, index.dtype)
        compute.copy_async(index_TK, index)
        hidden_TD = None
        if with_hidden:
            hidden = inputs.hidden_TD
            hidden_TD = engine.buffers["inputs"].tensor(hidden.shape, hidden.dtype)
            compute.copy_async(hidden_TD, hidden)
        return cls(index_TK, hidden_TD, compute.record(is_timed=True))

    def counts(self, num_experts: int) -> list[int]:
        """Rows of each expert; those of other ranks are marked with `num_experts`."""
        counts: list[int] = torch.bincount(self.index_TK.flatten(), minlength=num_experts).tolist()
        return counts[:num_experts]


class _Run:
    """Experts of one layer as they become ready: launched on the device, computed on the CPU.

    All that may be queued is queued before the CPU computes, so the device works meanwhile.
    """

    def __init__(
        self,
        layers: TieredLayers,
        engine: TieredEngine,
        access: TieredAccess,
        host_math: LayerMath | None,
        rows: DeviceRows,
        on_host: _OnHost,
        counts: list[int],
    ) -> None:
        self._layers = layers
        self._engine = engine
        self._access = access
        self._host_math = host_math
        self._rows = rows
        self._on_host = on_host
        self._counts = counts

    def go(self, held: list[int], plan: MissPlan) -> None:
        """Every expert of the layer; those that the device holds go first, together."""
        # One that is not ready made room for another of its own layer.
        self._launch([expert for expert in held if self._access.is_ready(expert)])
        start, num_read = time.perf_counter(), 0
        from_disk = {m.expert for m in (*plan.copied, *plan.computed) if m.is_on_disk}
        computed = {miss.expert for miss in plan.computed}
        outputs = self._host_outputs(plan)
        pending = self._access.pending()
        while pending:
            ready = [expert for expert in pending if self._access.is_ready(expert)]
            for expert in ready:
                if expert not in computed:
                    self._launch_measured(expert)
            on_cpu = [expert for expert in ready if expert in computed]
            if on_cpu:
                self._compute(on_cpu, outputs)
            num_read += len(from_disk.intersection(ready))
            if from_disk.intersection(ready):
                self._engine.planner.costs.read.add((time.perf_counter() - start) / num_read)
            from_disk.difference_update(ready)
            pending = self._access.pending()
            if not ready:
                self._access.await_host(pending[0])

    def _launch(self, experts: Sequence[int]) -> None:
        for expert in experts:
            self._access.await_device(expert)
        self._rows.compute(experts, self._access.compute)
        for expert in experts:
            self._access.release(expert)

    def _launch_measured(self, expert: int) -> None:
        compute = self._access.compute
        self._access.await_device(expert)
        start = compute.record(is_timed=True)
        self._rows.compute([expert], compute)
        end = compute.record(is_timed=True)
        learn, num_tokens = self._engine.planner.costs.device.add, self._counts[expert]
        self._layers.measure(lambda seconds: learn(num_tokens, seconds), start, end)
        self._access.release(expert)

    def _host_outputs(self, plan: MissPlan) -> dict[int, torch.Tensor]:
        """Pinned memory for what the CPU computes, by expert."""
        if not plan.computed:
            return {}
        output_RD = self._rows.output_RD
        sizes = [miss.num_tokens for miss in plan.computed]
        # The layer's sync was behind the copies of the last layer that used the buffer.
        memory = self._engine.buffers["outputs"].tensor(
            (sum(sizes), output_RD.shape[1]), output_RD.dtype
        )
        parts = torch.split(memory, sizes)
        return {miss.expert: part for miss, part in zip(plan.computed, parts, strict=True)}

    def _compute(self, experts: list[int], outputs: dict[int, torch.Tensor]) -> None:
        """Experts in host memory: each of their rows is a token of its own, of weight 1."""
        on_host = self._on_host
        assert self._host_math is not None
        assert on_host.hidden_TD is not None
        sizes = [self._counts[expert] for expert in experts]
        token_n = torch.cat([self._rows.tokens_of(e, on_host.index_TK) for e in experts])
        own = Dispatch(
            experts,
            list(itertools.accumulate(sizes, initial=0)),
            torch.arange(len(token_n)),
            torch.ones(len(token_n), 1),
        )
        start = time.perf_counter()
        max_together = min(len(experts), self._engine.host_slots.max_views)
        y_nD = self._host_math.run(
            on_host.hidden_TD[token_n], own, HostAccess(self._access, max_together)
        )
        seconds = time.perf_counter() - start
        for expert, y, size in zip(experts, torch.split(y_nD, sizes), sizes, strict=True):
            self._engine.planner.costs.host.add(size, seconds / len(experts))
            outputs[expert].copy_(y)
            rows_nD = self._rows.output_RD[self._rows.rows_of(expert)]
            self._access.compute.copy_async(rows_nD, outputs[expert])
