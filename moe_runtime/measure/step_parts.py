"""Names the parts of a model in a profile: attention, norms, router, experts and others."""

from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from moe_runtime.integrations.transformers.experts import NotCopied
from moe_runtime.integrations.transformers.handle import sites_of
from moe_runtime.integrations.transformers.routers import router_beside

ATTENTION, NORMS, ROUTER, EXPERTS = "attention", "norms", "router", "experts"
EMBEDDING, LM_HEAD, MLP = "embedding", "lm_head", "other MLPs"
PREFIX = "moe_runtime: "  # of ranges in a trace
# Words in the names of classes that mix tokens, as transformers calls them.
_MIXERS = ("Attention", "Mamba", "DeltaNet", "ShortConv")


def parts_of(model: nn.Module) -> dict[nn.Module, str]:
    """The outermost modules that are one part each. What runs in none of them is the rest."""
    sites = sites_of(model)
    known: dict[nn.Module, str] = {}
    known |= {router_beside(model, site): ROUTER for site in sites}
    known |= {site.module: EXPERTS for site in sites}  # also where they see what a router sees
    for name, part in (("get_input_embeddings", EMBEDDING), ("get_output_embeddings", LM_HEAD)):
        module = getattr(model, name, lambda: None)()
        if isinstance(module, nn.Module):
            known[module] = part
    found: dict[nn.Module, str] = {}
    _walk(model, known, found)
    return found


def _walk(module: nn.Module, known: dict[nn.Module, str], found: dict[nn.Module, str]) -> None:
    for child in module.children():
        part = known.get(child) or _part_by_class(child, known)
        if part is None:
            _walk(child, known, found)
        else:
            found[child] = part


def _part_by_class(module: nn.Module, known: dict[nn.Module, str]) -> str | None:
    if any(inner in known for inner in module.modules()):  # JambaAttentionDecoderLayer is no part
        return None
    name = type(module).__name__
    if any(word in name for word in _MIXERS):
        return ATTENTION
    if "Norm" in name:
        return NORMS
    return MLP if name.endswith("MLP") else None


class NamedParts:
    """While it is entered, each part of `model` that runs is a range of the profiler's."""

    def __init__(self, model: nn.Module) -> None:
        self._parts = parts_of(model)
        self._hooks: list[RemovableHandle] = []
        self._open: list[torch.profiler.record_function] = []

    def __enter__(self) -> "NamedParts":
        for module, part in self._parts.items():
            begin, end = _Begin(part, self._open), _End(self._open)
            self._hooks.append(module.register_forward_pre_hook(begin))
            self._hooks.append(module.register_forward_hook(end))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        while self._open:  # of a forward that failed
            self._open.pop().__exit__(None, None, None)


class _Begin(NotCopied):
    def __init__(self, part: str, running: list[torch.profiler.record_function]) -> None:
        self._name = PREFIX + part
        self._running = running

    def __call__(self, *_: Any) -> None:
        entered = torch.profiler.record_function(self._name)
        entered.__enter__()  # type: ignore[no-untyped-call]
        self._running.append(entered)


class _End(NotCopied):
    def __init__(self, running: list[torch.profiler.record_function]) -> None:
        self._running = running

    def __call__(self, *_: Any) -> None:
        self._running.pop().__exit__(None, None, None)
