"""What a user holds of a model with offloaded experts: its report and the way back."""

import shutil
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from moe_runtime.engine import ExpertEngine
from moe_runtime.errors import BudgetError, OffloadedExpertsError, UnsupportedModelError
from moe_runtime.expert_memory import format_bytes
from moe_runtime.foresight import Foresight
from moe_runtime.integrations.transformers.budget import Budget
from moe_runtime.integrations.transformers.experts import (
    OffloadedExpert,
    OffloadedExperts,
    OffloadedModule,
    argument_names,
    offloaded_class,
)
from moe_runtime.integrations.transformers.guards import (
    CheckBeforeUse,
    GuardedApply,
    refuse_new_weights,
)
from moe_runtime.integrations.transformers.layer_window import LayerWindow
from moe_runtime.integrations.transformers.sites import ExpertSite, find_sites, set_parameters
from moe_runtime.kernels.cpu.dequant_status import dequant_status
from moe_runtime.kernels.cpu.unpack_status import unpack_status
from moe_runtime.layer import ExpertMath, LayerMath
from moe_runtime.memory.available import available_memory_bytes
from moe_runtime.memory.mapped_tensor import MappedTensor
from moe_runtime.memory.packed_map import PackedMap
from moe_runtime.memory.quantised_map import QuantisedMap
from moe_runtime.parallel.expert_parallel import ExpertParallel
from moe_runtime.parallel.migrate import Stored
from moe_runtime.recording.run_recorder import NUM_SPANS, RunRecorder
from moe_runtime.tiered_ahead import TieredAhead
from moe_runtime.tiered_engine import TieredEngine
from moe_runtime.tiered_layer import TieredLayers
from moe_runtime.tiered_math import TieredMath

_ATTRIBUTE = "_moe_runtime_handle"


@dataclass(frozen=True, slots=True)
class Settings:
    """How a model was set up, as the report shows it."""

    policy: str
    dtype: str
    device: str
    direct_reads: bool
    holds_all_experts: bool
    packed_on_disk: bool
    quantisation: str | None  # the format of the experts in files and slots


class Handle:
    """Owns the engine of one model. A context manager: leaving it undoes the offload.

    `restore()` brings all experts back into the module; `close()` frees slots, threads and files
    and leaves a model that cannot run. Both may be called twice. `parallel` is what a model that
    was loaded on several ranks shares with them, else None. `plan` is what chose its settings, if
    anything did, as it stands in the report.
    """

    def __init__(
        self,
        root: nn.Module,
        sites: Sequence[ExpertSite],
        maths: Sequence[LayerMath | TieredMath | None],
        engine: ExpertEngine | TieredEngine,
        budget: Budget,
        settings: Settings,
        *,
        dense_bytes: int,
        mapped: Mapping[str, MappedTensor],
        device: torch.device,
        spill_folder: Path | None = None,
        parallel: ExpertParallel | None = None,
    ) -> None:
        self.engine = engine
        self.parallel = parallel
        self.plan: Mapping[str, Any] | None = None
        self.budget = budget
        self.settings = settings
        self._tiers = TieredLayers(engine) if isinstance(engine, TieredEngine) else None
        self._root = root
        self._sites = list(sites)
        self._dense_bytes = dense_bytes
        self._mapped = [root.get_parameter(name) for name in mapped]
        self._mapped_bytes = sum(parameter.nbytes for parameter in self._mapped)
        self._device = device
        self._spill_folder = spill_folder
        self._undo: list[Callable[[], object]] = []
        self._is_restored = False
        self._window: LayerWindow | None = None
        self._foresight: Foresight | None = None
        self._why_no_prediction = "predictor is off"
        self._before_close: list[Callable[[], object]] = []
        for layer, (site, math) in enumerate(zip(sites, maths, strict=True)):
            self._attach(layer, site, math)
        if parallel is not None and isinstance(engine, ExpertEngine):
            parallel.store_in(Stored(engine, budget.kind.name))
        for name, tensor in mapped.items():
            self._check_before_use(root.get_submodule(name.rpartition(".")[0]), tensor)
        root.__dict__[_ATTRIBUTE] = self
        for module in root.modules():
            self._guard(module)
        # A model that is dropped, or a program that ends, leaves no copy of the experts behind.
        self._remove_spill = weakref.finalize(self, _remove, spill_folder)

    @property
    def sites(self) -> tuple[ExpertSite, ...]:
        """Where the experts are: site `i` is MoE layer `i`."""
        return tuple(self._sites)

    @property
    def ahead(self) -> ExpertEngine | TieredAhead:
        """What brings experts closer before they are demanded."""
        return self.engine if isinstance(self.engine, ExpertEngine) else self.engine.ahead

    @property
    def foresight(self) -> Foresight | None:
        """What reads ahead of need, if anything may."""
        return self._foresight

    @property
    def bytes_read(self) -> int:
        """Bytes of weights asked of the disk so far, those of dense layers included."""
        dense = 0 if self._window is None else self._window.engine.bytes_read
        return self.engine.bytes_read + dense

    @property
    def experts_loaded(self) -> int:
        """Experts that came from behind the cache so far, each counted when it was used."""
        missed = sum(counts.misses for counts in self.engine.cache.counts.values())
        used: int = self.ahead.ahead_report()["used"]
        return missed + used

    @property
    def stall_seconds(self) -> float:
        """Time that layers have waited for them so far; none is known of a device's."""
        engines = [self.engine] + ([] if self._window is None else [self._window.engine])
        return sum(e.times.stall_seconds for e in engines if isinstance(e, ExpertEngine))

    @property
    def dense_used_bytes(self) -> int:
        """Bytes of dense weights that are in memory at a time, what is mapped not counted."""
        if self._window is None:
            return self._dense_bytes - self._mapped_bytes
        return self._window.plan.dense_bytes

    def foresee(self, foresight: Foresight, remove: Callable[[], object]) -> None:
        """Ask `foresight` what to read ahead, from now on; `remove` takes its hooks out."""
        reader, tiers = self.ahead, self._tiers
        self._foresight = reader.planner = foresight
        if tiers is not None:
            tiers.foresight = foresight
        for site in self._sites:
            site.module.__dict__["_foresight"] = foresight

        def undo() -> None:
            self._foresight = reader.planner = None
            if tiers is not None:
                tiers.foresight = None
            for site in self._sites:
                site.module.__dict__.pop("_foresight", None)
            remove()

        self._undo.insert(0, undo)

    def foresee_nothing(self, why: str) -> None:
        """Nothing is read ahead; `why` stands in reports."""
        self._why_no_prediction = why

    def stream(self, window: LayerWindow) -> None:
        """Decoder layers get their weights from `window` when they run, from now on."""
        self._window = window
        for module, state in window.states():
            self._swap(module, OffloadedExpert, **state)

    def on_detach(self, undo: Callable[[], object]) -> None:
        """Run `undo` when the model gets its own modules back."""
        self._undo.insert(0, undo)

    def before_close(self, action: Callable[[], object]) -> None:
        """Run `action` once, while slots and cache are still there."""
        self._before_close.append(action)

    def report(self) -> dict[str, Any]:
        """`cache`, `prediction`, `tiers`, `memory`, `settings` and `plan` of `generate --json`.

        Counts are since loading. `tiers` is None where experts are computed on the CPU.
        """
        tiers = self._tiers.report() if self._tiers is not None else None
        cache = self.engine.cache
        per_layer = [
            {
                "layer": layer,
                "name": site.name,
                "hits": cache.counts[layer].hits if layer in cache.counts else 0,
                "misses": cache.counts[layer].misses if layer in cache.counts else 0,
            }
            for layer, site in enumerate(self._sites)
        ]
        hits = sum(counts.hits for counts in cache.counts.values())
        misses = sum(counts.misses for counts in cache.counts.values())
        return {
            "cache": {
                "policy": self.settings.policy,
                "slots": self.budget.num_slots,
                "slot_bytes": self.budget.slot_bytes,
                "hits": hits,
                "misses": misses,
                "hit_rate": hits / (hits + misses) if hits + misses else None,
                "bytes_read": self.engine.bytes_read,
                "per_layer": per_layer,
            },
            "prediction": (
                {"predictor": None, "mode": "off", "why": self._why_no_prediction}
                if self._foresight is None
                else self._foresight.report()
            ),
            "tiers": tiers,
            "memory": {
                "expert_budget_bytes": self.budget.budget_bytes,
                "expert_used_bytes": self.budget.used_bytes,
                "expert_total_bytes": self.budget.expert_total_bytes,
                "expert_bytes": self.budget.expert_total_bytes // self.budget.num_experts,
                "expert_floor_bytes": self.budget.floor_bytes,
                "dense_bytes": self._dense_bytes,
                "dense_used_bytes": self.dense_used_bytes,
                "dense_window": None if self._window is None else self._window.report(),
                "mapped_bytes": self._mapped_bytes,
            },
            "settings": {
                **{name: v for name, v in asdict(self.settings).items() if name != "policy"},
                "dequant": self._dequant_path() if self.settings.quantisation else None,
                "expert_slots": self.budget.kind.name,
                "unpack": self._unpack_path() if self.settings.packed_on_disk else None,
                "experts": self._expert_paths(),
            },
            "plan": self.plan,
        } | ({} if self.parallel is None else {"parallel": self.parallel.report()})

    def recorder(self, *, num_spans: int = NUM_SPANS) -> RunRecorder:
        """Enter it to keep what the model does meanwhile: hits, bytes and lanes over time."""
        engine = self.engine
        stream = engine.streams.compute() if isinstance(engine, TieredEngine) else None
        return RunRecorder(
            self._root,
            engine,
            num_layers=len(self._sites),
            device_stream=stream,
            num_spans=num_spans,
        )

    def placement(self) -> str:
        """One line: what lives where."""
        budget = self.budget
        world = None if self.parallel is None else self.parallel.world
        share = "" if world is None else f"rank {world.rank} of {world.num_ranks}: "
        where = "all" if budget.holds_all else f"{budget.num_slots}"
        host = ""
        if isinstance(self.engine, TieredEngine):
            slots = self.engine.host_slots
            sort = "pinned" if slots.refusal is None else "pageable"
            behind = "packed " if self._is_unpacked_on_arrival else ""
            host = f"{slots.num_slots} {behind}in {sort} host memory, "
        reads = "direct reads" if self.settings.direct_reads else "reads through the page cache"
        packed = "packed " if self.settings.packed_on_disk else ""
        stored = f", {self.settings.quantisation}" if self.settings.quantisation else ""
        kind = self.budget.kind
        is_worth_saying = self.settings.packed_on_disk or isinstance(kind.blobs, QuantisedMap)
        kept = f"of {kind.name} slots " if is_worth_saying else ""
        return (
            f"{share}{budget.num_experts} experts of {len(self._sites)} layers "
            f"({format_bytes(budget.expert_total_bytes)}{stored}) {packed}on disk, "
            f"{host}{where} at a time in {format_bytes(budget.used_bytes)} {kept}on {self._device} "
            f"({self.settings.policy}, {reads}); dense weights {format_bytes(self._dense_bytes)}"
            + (f", {format_bytes(self._mapped_bytes)} mapped" if self._mapped_bytes else "")
            + ("" if self._window is None else f", {self._window.placement()}")
        )

    def restore(self) -> None:
        """Read every expert back into its module, as if it had never been offloaded.

        What is mapped is read too: the files may be written over afterwards.

        Raises BudgetError when they do not fit in free memory; the offload then stays as it was.
        """
        if self._is_restored:
            return
        if isinstance(self.budget.kind.blobs, QuantisedMap):
            raise OffloadedExpertsError(
                f"experts that were rounded to {self.budget.kind.name} cannot be restored; "
                "load the model again without expert_dtype"
            )
        needed = sum(
            site.num_experts * self.engine.tensor_map.layers[layer].computed.weight_bytes
            for layer, site in enumerate(self._sites)
        )
        needed += self._dense_bytes - self.dense_used_bytes
        free = available_memory_bytes()
        if self._device.type == "cpu" and needed > free:
            raise BudgetError(
                f"restoring takes {format_bytes(needed)} and {format_bytes(free)} are free; "
                "close other programs, or keep the experts offloaded"
            )
        self._run_before_close()
        restored = [self._read_site(layer, site) for layer, site in enumerate(self._sites)]
        if self._window is not None:
            self._window.restore()
        self._detach()
        for site, tensors in zip(self._sites, restored, strict=True):
            set_parameters(site, tensors)
        for parameter in self._mapped:
            parameter.data = parameter.data.clone()
        self._is_restored = True
        self.close()

    def close(self) -> None:
        """Free slots, threads, files and what was written to disk for this model."""
        self._run_before_close()
        self.engine.close()
        if self._window is not None:
            self._window.close()
        self._remove_spill()
        if self.parallel is not None:
            self.parallel.close()

    def _run_before_close(self) -> None:
        while self._before_close and not self.engine.is_closed:
            self._before_close.pop()()

    def __enter__(self) -> "Handle":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """A model offloaded from memory is restored; one loaded from disk is closed."""
        if self._spill_folder is not None and not self.engine.is_closed:
            self.restore()
        self.close()

    @property
    def _is_unpacked_on_arrival(self) -> bool:
        """Whether experts travel packed to the device that computes them."""
        return isinstance(self.budget.kind.behind.blobs, PackedMap) and self._tiers is not None

    def _unpack_path(self) -> str:
        """What unpacks, as reports name it."""
        return "triton, on arrival" if self._is_unpacked_on_arrival else unpack_status()

    def _dequant_path(self) -> str:
        """What dequantises, as reports name it."""
        if self._tiers is None:
            return dequant_status()
        one_by_one = "on the device, one expert at a time"
        return one_by_one if self.budget.kind.room_bytes else "triton, in its products"

    def _expert_paths(self) -> str:
        """Which code computes experts: ours, or the family's own forward."""
        fused = [site.module for site in self._sites if site.is_fused]
        if not fused:
            return "module list"
        maths = [module._math for module in fused if isinstance(module, OffloadedExperts)]
        paths = ("torch, family's forward" if math is None else math.path for math in maths)
        names = "; ".join(dict.fromkeys(paths))
        kind = self.budget.kind
        return names if kind.blobs is None else f"{names}, from {kind.name} slots"

    def _attach(self, layer: int, site: ExpertSite, math: LayerMath | TieredMath | None) -> None:
        slot_like = torch.empty(0, dtype=site.parameters[0].dtype, device=self._device)
        if site.is_fused:
            for parameter in site.parameters:
                site.module._parameters.pop(parameter.name, None)
            self._swap(
                site.module,
                OffloadedExperts,
                _math=math,
                _num_experts=site.num_experts,
                _argument_names=argument_names(type(site.module)),
                _parallel=self.parallel,
                _engine=self.engine,
                _layer=layer,
                _slot_like=slot_like,
                _tiers=self._tiers,
            )
            if self.parallel is not None:
                sum_dtype = math.accumulator.dtype if isinstance(math, ExpertMath) else None
                self.parallel.attach(site.module.compute, sum_dtype)  # type: ignore[arg-type]
            return
        for expert, module in enumerate(site.module.children()):
            places = {}
            for parameter in site.parameters:
                path, _, attribute = parameter.name.rpartition(".")
                owner = module.get_submodule(path)
                absent = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                owner._parameters[attribute] = nn.Parameter(absent, requires_grad=False)
                places[parameter.name] = (owner, attribute)
            self._swap(
                module,
                OffloadedExpert,
                _expert=expert,
                _places=places,
                _engine=self.engine,
                _layer=layer,
                _slot_like=slot_like,
            )

    def _swap(self, module: nn.Module, mixin: type[OffloadedModule], **state: Any) -> None:
        original = type(module)

        def undo() -> None:
            module.__class__ = original
            for name in state:
                del module.__dict__[name]

        module.__dict__.update(state)
        module.__class__ = offloaded_class(original, mixin)
        self._undo.append(undo)

    def _guard(self, module: nn.Module) -> None:
        """Make `module`, if it holds offloaded ones, ask before it moves, casts or loads anything.

        So that an operation which they refuse leaves nothing half done in their neighbours.
        """
        inside = next((m for m in module.modules() if isinstance(m, OffloadedModule)), None)
        if inside is None or isinstance(module, OffloadedModule):
            return
        module.__dict__["_apply"] = GuardedApply(module, inside)
        hook = module.register_load_state_dict_pre_hook(refuse_new_weights)  # type: ignore[no-untyped-call]
        self._undo += [lambda: module.__dict__.pop("_apply"), hook.remove]

    def _check_before_use(self, module: nn.Module, mapped: MappedTensor) -> None:
        hook = module.register_forward_pre_hook(CheckBeforeUse(mapped))
        self._undo.append(hook.remove)

    def _detach(self) -> None:
        for undo in self._undo:
            undo()
        self._root.__dict__.pop(_ATTRIBUTE, None)

    def _read_site(self, layer: int, site: ExpertSite) -> dict[str, torch.Tensor]:
        tensors = {
            p.name: torch.empty((site.num_experts, *p.shape), dtype=p.dtype, device=self._device)
            for p in site.parameters
        }
        with self.engine.open_layer(layer, range(site.num_experts)) as access:
            for expert in range(site.num_experts):
                for name, value in access.weights(expert).items():
                    tensors[name][expert].copy_(value)
                access.release(expert)
        return tensors


def _remove(folder: Path | None) -> None:
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def handle(model: nn.Module) -> Handle:
    """The handle of a model whose experts are offloaded, also when another module wraps it."""
    for module in model.modules():
        if _ATTRIBUTE in module.__dict__:
            found: Handle = module.__dict__[_ATTRIBUTE]
            return found
    raise UnsupportedModelError(
        f"{type(model).__name__} has no offloaded experts; use moe_runtime.load() or "
        "moe_runtime.offload()"
    )


def sites_of(model: nn.Module) -> list[ExpertSite]:
    """The MoE layers of a model, offloaded or not. Raises UnsupportedModelError if it has none."""
    if any(isinstance(module, OffloadedModule) for module in model.modules()):
        return list(handle(model).sites)
    sites = find_sites(model)
    if not sites:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no experts; give a Mixture-of-Experts model"
        )
    return sites


def refuse_twice(model: nn.Module) -> None:
    """Raise if the experts of `model` are offloaded already."""
    if any(isinstance(module, OffloadedModule) for module in model.modules()):
        raise OffloadedExpertsError(
            "the experts of this model are offloaded already; "
            "call moe_runtime.handle(model).restore() before another offload()"
        )
