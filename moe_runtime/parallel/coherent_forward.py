"""Steps decoder layers with the rows that are on this rank, while rows move from rank to rank.

T tokens of this rank, N rows of all ranks together, R rows that are on this rank, D model dim.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from moe_runtime.parallel.coherent import CoherentDispatcher, Travellers
from moe_runtime.parallel.context import SharedContext
from moe_runtime.parallel.dispatcher import Rows
from moe_runtime.parallel.expert_parallel import ExpertParallel
from moe_runtime.parallel.forward_step import Step
from moe_runtime.parallel.ledger import CONTEXT
from moe_runtime.parallel.traffic import NUMBER_BYTES


class DecoderSteps(Protocol):
    """The parts of a model's decoder layers, for rows of any sequences; all are row by row."""

    @property
    def num_layers(self) -> int: ...

    @property
    def like(self) -> Rows:
        """No rows, in the sizes and dtypes of what `route` returns."""

    def moe_layer(self, layer: int) -> int | None:
        """The number of the MoE layer in a decoder layer, None where it has a dense one."""

    def attend(
        self,
        layer: int,
        hidden_RD: torch.Tensor,
        position_R: torch.Tensor,
        visible_RP: torch.Tensor,
        context: SharedContext,
    ) -> torch.Tensor:
        """`[R, D]`: the stream behind attention, which looks at `context`."""

    def route(self, layer: int, hidden_RD: torch.Tensor) -> Rows:
        """What the router asks of the experts for these rows of the stream."""

    def expert_input(self, layer: int, hidden_RD: torch.Tensor) -> torch.Tensor:
        """`[R, D]`: what the experts see of the stream."""

    def complete(
        self, layer: int, hidden_RD: torch.Tensor, experts_RD: torch.Tensor | None
    ) -> torch.Tensor:
        """`[R, D]`: the stream behind the layer, by what its experts made; None for a dense one."""


@dataclass(frozen=True, slots=True, eq=False)
class _Joint:
    """The rows of all ranks in one forward, by number."""

    sequence_N: torch.Tensor
    position_N: torch.Tensor
    origin_N: torch.Tensor
    first: int  # number of this rank's first row


class CoherentForward:
    """The forwards of one model under coherent dispatch. Every rank calls for every forward."""

    def __init__(
        self,
        parallel: ExpertParallel,
        dispatcher: CoherentDispatcher,
        steps: DecoderSteps,
        context: SharedContext,
    ) -> None:
        self._parallel = parallel
        self._dispatcher = dispatcher
        self._steps = steps
        self._context = context
        self._done_with: list[int] = []  # sequences whose caches are gone
        moe = [layer for layer in range(steps.num_layers) if steps.moe_layer(layer) is not None]
        self._last_moe = moe[-1]

    def forget(self, sequences: list[int]) -> None:
        """Tell every rank, with the next forward, that nobody will go on with these."""
        self._done_with += sequences

    def run(
        self, hidden_TD: torch.Tensor, sequence_T: torch.Tensor, position_T: torch.Tensor
    ) -> torch.Tensor:
        """`[T, D]`: the stream behind the last layer."""
        like = self._steps.like
        rows = Rows(hidden_TD, like.index, like.weights)
        gone = self._take_gone()
        step = self._parallel.begin(rows, num_extra=len(gone))
        joint = self._announce(sequence_T, position_T, gone, step)
        hidden = self._walk(hidden_TD, joint, step)
        self._parallel.end()
        return hidden

    def take_part(self) -> bool:
        """A forward of the others; False if no rank has one."""
        gone = self._take_gone()
        step = self._parallel.begin(None, num_extra=len(gone))
        joint = self._announce(gone[:0], gone[:0], gone, step)
        if not step.is_idle:
            self._walk(self._steps.like.hidden, joint, step)
        self._parallel.end()
        return not step.is_idle

    def _take_gone(self) -> torch.Tensor:
        """Sequences to drop; those that come to it from now on wait for the next forward."""
        gone, self._done_with = self._done_with, []
        return torch.tensor(gone, dtype=torch.int64, device=self._steps.like.hidden.device)

    def _announce(
        self, sequence_T: torch.Tensor, position_T: torch.Tensor, gone: torch.Tensor, step: Step
    ) -> _Joint:
        """All rows of the forward, for which the context makes room; `gone` leave it."""
        ledger, device = self._parallel.world.ledger, sequence_T.device
        mine = torch.stack(
            [torch.cat([sequence_T, gone]), torch.cat([position_T, torch.full_like(gone, -1)])], 1
        ).to(torch.int32)
        ledger.expect(CONTEXT, [len(mine) * 2 * NUMBER_BYTES] * ledger.num_ranks)
        tokens = step.tokens_by_rank
        counts = [t + extra for t, extra in zip(tokens, step.extras_by_rank, strict=True)]
        heard = ledger.gather_rows(CONTEXT, mine, counts)
        over = torch.cat([part[t:, 0] for part, t in zip(heard, tokens, strict=True)]).long()
        if len(over):
            self._context.forget(over)
        told = torch.cat([part[:t] for part, t in zip(heard, tokens, strict=True)]).long()
        joint = _Joint(
            sequence_N=told[:, 0],
            position_N=told[:, 1],
            origin_N=torch.arange(len(tokens), device=device).repeat_interleave(
                torch.tensor(tokens, device=device)
            ),
            first=sum(tokens[: ledger.rank]),
        )
        self._context.begin(joint.sequence_N, joint.position_N)
        return joint

    def _walk(self, hidden_TD: torch.Tensor, joint: _Joint, step: Step) -> torch.Tensor:
        steps, context = self._steps, self._context
        number = torch.arange(
            joint.first, joint.first + len(hidden_TD), dtype=torch.int32, device=hidden_TD.device
        )
        rows, rows_by_rank = Travellers(hidden_TD, number), step.tokens_by_rank
        for layer in range(steps.num_layers):
            context.enter(rows.number, rows_by_rank)
            rows = Travellers(self._attend(layer, rows, joint), rows.number)
            moe_layer = steps.moe_layer(layer)
            if moe_layer is None:
                if len(rows):
                    rows = Travellers(steps.complete(layer, rows.hidden, None), rows.number)
                continue
            routed = steps.route(layer, rows.hidden) if len(rows) else steps.like
            is_last = layer == self._last_moe
            here, state = self._dispatcher.dispatch(
                moe_layer, rows, routed, joint.origin_N if is_last else None
            )
            sums = here.hidden
            if len(here):
                seen = steps.expert_input(layer, here.hidden)
                sums = self._parallel.compute(moe_layer, Rows(seen, here.index, here.weights))
            rows, experts = self._dispatcher.settle(sums, state)
            rows_by_rank = state.homes_by_rank
            if len(rows):
                rows = Travellers(steps.complete(layer, rows.hidden, experts), rows.number)
        context.finish()
        return rows.hidden[rows.number.argsort()]

    def _attend(self, layer: int, rows: Travellers, joint: _Joint) -> torch.Tensor:
        if not len(rows):
            self._context.update_nothing(layer)
            return rows.hidden
        place = rows.number.long()
        position = joint.position_N[place]
        visible = self._context.visible(joint.sequence_N[place], position)
        return self._steps.attend(layer, rows.hidden, position, visible, self._context)
