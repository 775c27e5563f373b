"""What asks before parts of an offloaded model are moved, cast, loaded into or looked up."""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import nn

from moe_runtime.errors import OffloadedExpertsError
from moe_runtime.integrations.transformers.experts import REMEDY, NotCopied, OffloadedModule
from moe_runtime.memory.mapped_tensor import MappedTensor


class CheckBeforeUse(NotCopied):
    """Asks a mapped tensor, before a module looks rows up in it, whether its file is as it was."""

    def __init__(self, mapped: MappedTensor) -> None:
        self._mapped = mapped

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *_: Any) -> None:
        self._mapped.check()


class GuardedApply:
    """Asks an offloaded module before a module around it moves or casts anything."""

    def __init__(self, module: nn.Module, guard: OffloadedModule) -> None:
        self._module = module
        self._guard = guard

    def __call__(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        self._guard.check_move(fn)
        return type(self._module)._apply(self._module, fn, recurse)  # type: ignore[no-untyped-call]


def refuse_new_weights(*_: Any) -> NoReturn:
    """A hook for modules that would take a state dict."""
    raise OffloadedExpertsError(f"offloaded experts cannot take new weights; {REMEDY}")
