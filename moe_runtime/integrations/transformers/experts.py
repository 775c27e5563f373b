"""Experts modules whose weights live in slots, standing where transformers' modules stood."""

import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any, NoReturn

import torch
from torch import nn

from moe_runtime.engine import ExpertEngine, Weights
from moe_runtime.errors import OffloadedExpertsError
from moe_runtime.foresight import Foresight
from moe_runtime.layer import Dispatch, ExpertAccess, LayerMath
from moe_runtime.parallel.expert_parallel import ExpertParallel
from moe_runtime.tiered_engine import TieredEngine
from moe_runtime.tiered_layer import TieredLayers
from moe_runtime.tiered_math import TieredMath

REMEDY = "call moe_runtime.handle(model).restore() first"


class NotCopied:
    """Part of a model that is bound to files and slots: refuses to be copied or pickled."""

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise OffloadedExpertsError(
            f"a model with offloaded experts cannot be copied; load it twice, or {REMEDY}"
        )

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise OffloadedExpertsError(
            f"a model with offloaded experts cannot be pickled; pickle its path, or {REMEDY}"
        )


class OffloadedModule(NotCopied, nn.Module):
    """Refuses what would silently lose the experts of a module whose weights are not in it."""

    _engine: ExpertEngine | TieredEngine
    _layer: int
    _slot_like: torch.Tensor  # empty; has the dtype and device of the experts

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        self.check_move(fn)
        # Nothing of ours moves; absent weights are on the meta device and must not be touched.
        return self

    def check_move(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Raise if `fn`, a move or cast of tensors, would have to change the experts."""
        moved = fn(self._slot_like)
        if (moved.dtype, moved.device) != (self._slot_like.dtype, self._slot_like.device):
            raise OffloadedExpertsError(
                f"offloaded experts stay {self._slot_like.dtype} on {self._slot_like.device}; "
                f"load the model again with dtype= or device_map=, or {REMEDY}"
            )

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise OffloadedExpertsError(
            f"the experts are offloaded, a state_dict or checkpoint would lack them; {REMEDY}"
        )

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise OffloadedExpertsError(f"offloaded experts cannot take new weights; {REMEDY}")

    def _refuse_training(self) -> None:
        if self.training:
            raise OffloadedExpertsError(
                f"offloaded experts are for inference; call model.eval(), or to train {REMEDY}"
            )


class OffloadedExperts(OffloadedModule):
    """Mixed into transformers' experts class in place of its parameters and its forward."""

    _math: LayerMath | TieredMath | None  # None: the class's own forward runs, fed from slots
    _num_experts: int
    _argument_names: tuple[str, ...]
    _foresight: Foresight | None = None
    _tiers: TieredLayers | None  # None: experts are computed on the CPU, from its slots
    _parallel: ExpertParallel | None  # which moves tokens to the ranks of their experts

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        hidden_TD, top_k_index_TK, top_k_weights_TK = (
            *args,
            *(kwargs[name] for name in self._argument_names[len(args) :]),
        )
        needs_grad = torch.is_grad_enabled() and (
            hidden_TD.requires_grad or top_k_weights_TK.requires_grad
        )
        if needs_grad:
            self._refuse_training()
        with torch.no_grad():
            if self._parallel is None:
                output = self.compute(hidden_TD, top_k_index_TK, top_k_weights_TK)
            else:
                output = self._parallel.run(
                    self._layer, hidden_TD, top_k_index_TK, top_k_weights_TK
                )
        return _without_backward(output, hidden_TD, top_k_weights_TK) if needs_grad else output

    def compute(
        self,
        hidden_TD: torch.Tensor,
        top_k_index_TK: torch.Tensor,
        top_k_weights_TK: torch.Tensor,
    ) -> torch.Tensor:
        """The weighted sums `[T, D]` over experts of this process; id E asks for none."""
        if isinstance(self._math, TieredMath):
            assert self._tiers is not None
            return self._tiers.run(
                self._layer, self._math, hidden_TD, top_k_index_TK, top_k_weights_TK
            )
        dispatch = Dispatch.of(top_k_index_TK, top_k_weights_TK, self._num_experts)
        if not dispatch.experts:
            return torch.zeros_like(hidden_TD)
        if self._foresight is not None:
            self._foresight.routed(self._layer, top_k_index_TK)
        with self._engine.open_layer(self._layer, dispatch.experts) as access:
            if self._math is not None:
                return self._math.run(hidden_TD, dispatch, access)
            return self._run_reference(access, hidden_TD, top_k_index_TK, top_k_weights_TK)

    def _run_reference(self, access: ExpertAccess, *inputs: torch.Tensor) -> torch.Tensor:
        forward = reference_forward(type(self))
        output: torch.Tensor = forward(_ReferenceSelf(self, _InTurn(access)), *inputs)
        return output

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            layout = self._engine.tensor_map.layers[self._layer].computed
            if any(spec.name == name for spec in layout.parameters):
                raise AttributeError(f"{name!r} is offloaded; {REMEDY}") from None
            raise


class OffloadedExpert(OffloadedModule):
    """Mixed into one module of a ModuleList of experts: weights are in it only while it runs."""

    _expert: int
    _places: dict[str, tuple[nn.Module, str]]  # parameter name -> owner and its attribute

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        inputs = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
        needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        if needs_grad:
            self._refuse_training()
        with (
            torch.no_grad(),
            self._engine.open_layer(self._layer, [self._expert]) as access,
        ):
            absent = {name: owner._parameters[a] for name, (owner, a) in self._places.items()}
            try:
                self._bind(access.weights(self._expert))
                output = super().forward(*args, **kwargs)
            finally:
                for name, (owner, attribute) in self._places.items():
                    owner._parameters[attribute] = absent[name]
        if not needs_grad:
            return output
        parts = output if isinstance(output, tuple) else (output,)
        tied = tuple(
            _without_backward(part, *inputs) if isinstance(part, torch.Tensor) else part
            for part in parts
        )
        return tied if isinstance(output, tuple) else tied[0]

    def _bind(self, weights: Weights) -> None:
        for name, (owner, attribute) in self._places.items():
            owner._parameters[attribute] = nn.Parameter(weights[name], requires_grad=False)


def reference_forward(experts_class: type) -> Callable[..., torch.Tensor]:
    """The eager forward that `use_experts_implementation` wrapped."""
    forward = next(
        c.__dict__["forward"]
        for c in experts_class.__mro__
        if "forward" in c.__dict__ and not issubclass(c, OffloadedModule)
    )
    reference: Callable[..., torch.Tensor] = inspect.unwrap(forward)
    return reference


def argument_names(experts_class: type) -> tuple[str, ...]:
    """Names of the three inputs, as this family calls them."""
    return tuple(inspect.signature(reference_forward(experts_class)).parameters)[1:4]


def offloaded_class(base: type[nn.Module], mixin: type[OffloadedModule]) -> type[nn.Module]:
    """`base` with `mixin` before it; keeps its name, so that reports read as before."""
    return type(base.__name__, (mixin, base), {"__module__": base.__module__})


class _InTurn:
    """Releases an expert when the reference's loop goes on to the next."""

    def __init__(self, access: ExpertAccess) -> None:
        self._access = access
        self._current: int | None = None

    def weights(self, expert: int) -> Weights:
        if self._current is not None and self._current != expert:
            self._access.release(self._current)
        self._current = expert
        return self._access.weights(expert)


class _ReferenceSelf:
    """What the class's own forward sees as `self`: the module, with parameters read on demand."""

    def __init__(self, module: OffloadedExperts, in_turn: _InTurn) -> None:
        self._module = module
        layout = module._engine.tensor_map.layers[module._layer].computed
        for spec in layout.parameters:
            setattr(self, spec.name, _ReferenceParameter(in_turn, spec.name))

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if inspect.ismethod(value) and value.__self__ is self._module:
            return MethodType(value.__func__, self)  # it may use the parameters too
        return value


class _ReferenceParameter:
    """A parameter `[E, ...]` of which one expert at a time is there."""

    def __init__(self, in_turn: _InTurn, name: str) -> None:
        self._in_turn = in_turn
        self._name = name

    def __getitem__(self, expert: int | torch.Tensor) -> torch.Tensor:
        return self._in_turn.weights(int(expert))[self._name]


def _without_backward(output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
    """`output`, tied to `inputs` so that a backward pass through it raises instead of lying."""
    result: torch.Tensor = _WithoutBackward.apply(output, *inputs)  # type: ignore[no-untyped-call]
    return result


class _WithoutBackward(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> NoReturn:
        raise OffloadedExpertsError(f"no gradient flows through offloaded experts; {REMEDY}")
