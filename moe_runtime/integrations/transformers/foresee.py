"""Sets a predictor beside a loaded model, and brings back what it knew when it ran last."""

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from moe_runtime.engine import ExpertEngine
from moe_runtime.errors import PredictorError, UnsupportedModelError
from moe_runtime.foresight import Foresight
from moe_runtime.integrations.transformers.experts import NotCopied
from moe_runtime.integrations.transformers.forward_rows import SequenceNumbers, named_arguments
from moe_runtime.integrations.transformers.handle import Handle
from moe_runtime.integrations.transformers.routers import gate_of, router_beside
from moe_runtime.memory.checkpoint_digest import checkpoint_digest
from moe_runtime.memory.disk import CHUNK_BYTES
from moe_runtime.predictors.live_gates import LiveGates
from moe_runtime.predictors.predictor import Fingerprint, Foreteller
from moe_runtime.predictors.registry import PREDICTORS
from moe_runtime.predictors.store import load_predictor
from moe_runtime.scheduling.benefit import BenefitGate
from moe_runtime.warm_start import WarmStart, state_file

logger = logging.getLogger("moe_runtime")

AUTO, OFF = "auto", "off"


@dataclass(frozen=True)
class Origin:
    """Where a model came from, and how its routing looks; `memory` is where digests are kept."""

    folder: Path
    memory: Path | None
    num_layers: int
    num_experts: int
    top_k: int
    is_packed: bool

    @classmethod
    def of(cls, folder: Path, handle: Handle, memory: Path | None) -> "Origin":
        sites = handle.sites
        return cls(
            folder=folder,
            memory=memory,
            num_layers=len(sites),
            num_experts=max(site.num_experts for site in sites),
            top_k=max(site.top_k for site in sites),
            is_packed=handle.settings.packed_on_disk,
        )

    @cached_property
    def digest(self) -> str:
        return checkpoint_digest(self.folder, self.memory)

    def fingerprint(self, *, with_digest: bool) -> Fingerprint:
        """What a predictor has to fit. A packed checkpoint has other bytes than its original."""
        return Fingerprint(
            model="unknown" if self.is_packed else self.folder.resolve().name,
            num_layers=self.num_layers,
            num_experts=self.num_experts,
            top_k=self.top_k,
            checkpoint=self.digest if with_digest and not self.is_packed else "",
        )


def check_predictor(predictor: str | Path) -> None:
    """Raise PredictorError for a word that is neither a predictor's nor a file."""
    text = str(predictor)
    if text in (AUTO, OFF, LiveGates.name) or Path(text).is_file():
        return
    if text in PREDICTORS:
        raise PredictorError(
            f"predictor {text!r} has to be fitted first; give the file that "
            f"`moe-runtime predictor train` writes, or {AUTO}, {OFF} or {LiveGates.name}"
        )
    raise PredictorError(
        f"predictor {text!r} is neither a file nor {AUTO}, {OFF} or {LiveGates.name}; "
        "`moe-runtime predictor train` writes such a file"
    )


def foresee(model: nn.Module, handle: Handle, predictor: str | Path, origin: Origin) -> None:
    """Let `handle` read ahead what `predictor` foretells. Raises PredictorError.

    'auto' takes the model's own routers, and leaves prediction off, with the reason in the report,
    where it cannot tell what they compute or nothing is ever read.
    """
    text = str(predictor)
    if text == OFF:
        return
    if text == AUTO and handle.budget.holds_all:
        handle.foresee_nothing("all experts fit in memory")
        return
    try:
        foreteller = _make(model, handle, text, origin)
    except UnsupportedModelError as error:
        if text != AUTO:
            raise PredictorError(f"predictor {text} cannot be used: {error}") from error
        handle.foresee_nothing(str(error))
        return
    gate = BenefitGate(piece_share(handle))
    attach(model, handle, Foresight(handle.ahead, foreteller, gate))


def piece_share(handle: Handle) -> float:
    """Of an expert, how much may be on its way that nobody demanded, when a demand comes."""
    if not isinstance(handle.engine, ExpertEngine):
        return 1.0  # a copy to the device is queued whole
    return min(1.0, CHUNK_BYTES / handle.budget.slot_bytes)


def attach(model: nn.Module, handle: Handle, foresight: Foresight) -> None:
    """Let `foresight` hear what the routers of `model` see and choose."""
    routers = _RouterHooks(model, handle, foresight)
    hooks = [
        model.register_forward_pre_hook(_Begin(foresight, routers), with_kwargs=True),
        model.register_forward_hook(_End(foresight)),
    ]

    def remove() -> None:
        routers.set(False)
        for hook in hooks:
            hook.remove()

    handle.foresee(foresight, remove)


class _RouterHooks:
    """Hooks of routers, which cost time in every layer: there only while somebody listens."""

    def __init__(self, model: nn.Module, handle: Handle, foresight: Foresight) -> None:
        self._foresight = foresight
        self._routers: list[nn.Module] = []
        if "hidden" in foresight.predictor.needs:
            self._routers = [router_beside(model, site) for site in handle.sites]
        self._hooks: list[RemovableHandle] = []

    def set(self, is_wanted: bool) -> None:
        """Put them in or take them out."""
        if is_wanted and not self._hooks:
            self._hooks = [
                router.register_forward_pre_hook(_Saw(self._foresight, layer), with_kwargs=True)
                for layer, router in enumerate(self._routers)
            ]
        elif self._hooks and not is_wanted:
            for hook in self._hooks:
                hook.remove()
            self._hooks = []


def start_warm(handle: Handle, folder: Path, origin: Origin) -> None:
    """Read first what was in slots when this checkpoint was closed last, and save it at close().

    Slots on a GPU start empty.
    """
    if not isinstance(handle.engine, ExpertEngine):
        return
    memory = WarmStart(
        state_file(folder, origin.digest),
        engine=handle.engine,
        foresight=handle.foresight,
        shape=(origin.num_layers, origin.num_experts),
        checkpoint=origin.digest,
    )
    memory.recall()
    handle.before_close(memory.save)


def _make(model: nn.Module, handle: Handle, text: str, origin: Origin) -> Foreteller:
    listed = next((site for site in handle.sites if not site.is_fused), None)
    if listed is not None:
        raise UnsupportedModelError(
            f"{listed.name} is a list of modules, which do not see what the router chose; use "
            "predictor='off'"
        )
    if text not in (AUTO, LiveGates.name):
        return load_predictor(Path(text), origin.fingerprint(with_digest=True))
    gates = [gate_of(router_beside(model, site), site.num_experts) for site in handle.sites]
    return LiveGates(origin.fingerprint(with_digest=False), gates)


class _Begin(NotCopied):
    """Says whose tokens a forward runs, before it does."""

    def __init__(self, foresight: Foresight, routers: _RouterHooks) -> None:
        self._foresight = foresight
        self._routers = routers
        self._sequences = SequenceNumbers()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = args[0] if args else kwargs.get("input_ids")
        if tokens is None:
            tokens = kwargs.get("inputs_embeds")
        if tokens is None:
            return
        self._routers.set(self._foresight.is_listening)
        self._foresight.begin(
            tokens.shape[0] * tokens.shape[1],
            lambda: self._sequences.rows(named_arguments(module, args, kwargs)),
        )


class _End(NotCopied):
    """Says that a forward is over."""

    def __init__(self, foresight: Foresight) -> None:
        self._foresight = foresight

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *_: Any) -> None:
        self._foresight.end()


class _Saw(NotCopied):
    """Hands on what a router is given."""

    def __init__(self, foresight: Foresight, layer: int) -> None:
        self._foresight = foresight
        self._layer = layer

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._foresight.saw(self._layer, args[0] if args else next(iter(kwargs.values())))
