"""A whole MoE layer of replaceable parts: gate, order, dispatcher and experts, with six hooks.

T tokens of this rank, K top-k, E experts, D model dim.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from moe_runtime.parallel.dispatcher import Dispatcher, Rows
from moe_runtime.parallel.gates import Gate, Routing
from moe_runtime.parallel.local import LocalDispatcher
from moe_runtime.parallel.order import Order, SortOrder
from moe_runtime.parallel.pipeline import run_in_chunks

Expert = Callable[[torch.Tensor], Any]  # `[n, D]` -> `[n, D]`, or a tuple that begins with it


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """What runs between the parts; each is given what the next part gets, and returns it.

    FSMoE's six (arXiv 2501.10714, section 3). Between dispatch and combine, where a layer may run
    in chunks, a hook is called for each that has rows here.
    """

    before_moe_start: Callable[[torch.Tensor], torch.Tensor] = _same  # tokens `[T, D]`
    before_dispatch: Callable[[Rows], Rows] = _same  # tokens with their routing
    after_dispatch: Callable[[Rows], Rows] = _same  # the rows that are here
    before_combine: Callable[[torch.Tensor], torch.Tensor] = _same  # their weighted sums
    after_combine: Callable[[torch.Tensor], torch.Tensor] = _same  # `[T, D]`
    before_moe_end: Callable[[torch.Tensor], torch.Tensor] = _same  # as the input was shaped


@dataclass(frozen=True, slots=True, kw_only=True)
class MoELayer:
    """`layer(x)` for `x [..., D]`; every rank calls it equally often, with any number of tokens.

    `experts` are those of this rank by their id among all. Without a dispatcher all must be there;
    `AllToAllDispatcher` needs to know nothing of the others' tokens.
    `degree` chunks, the same on all ranks, let messages and computing overlap. For inference:
    messages have no backward.
    """

    gate: Gate
    experts: Mapping[int, Expert]
    dispatcher: Dispatcher[Any] = field(default_factory=LocalDispatcher)
    order: Order[Any] = field(default_factory=SortOrder)
    hooks: Hooks = field(default_factory=Hooks)
    degree: int = 1

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x)[0]

    def run(self, x: torch.Tensor) -> tuple[torch.Tensor, Routing]:
        """The output, and what the gate decided."""
        hidden_TD = self.hooks.before_moe_start(x.reshape(-1, x.shape[-1]))
        routing = self.gate(hidden_TD)
        rows = self.hooks.before_dispatch(Rows(hidden_TD, routing.index, routing.weights))
        combined_TD = run_in_chunks(
            self.dispatcher, 0, rows, None, self._compute, degree=self.degree
        )
        output_TD = self.hooks.after_combine(combined_TD)
        return self.hooks.before_moe_end(output_TD.reshape(x.shape)), routing

    def _compute(self, here: Rows) -> torch.Tensor:
        here = self.hooks.after_dispatch(here)
        inputs, state = self.order.arrange(here, self.gate.num_experts)
        outputs = {}
        for expert, x_nD in inputs.items():
            y_nD = self.experts[expert](x_nD)
            outputs[expert] = y_nD[0] if isinstance(y_nD, tuple) else y_nD
        sums = self.order.restore(outputs, state).to(here.hidden.dtype)
        return self.hooks.before_combine(sums)
