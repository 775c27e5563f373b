"""What moves tokens to the ranks of their experts and brings the results back.

T tokens of this rank, R rows to compute here, K top-k, D model dim.
"""

from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from moe_runtime.parallel.payload import ExactPayload, Payload
from moe_runtime.parallel.traffic import RowBytes

_EXACT = ExactPayload()


@dataclass(frozen=True, slots=True)
class Rows:
    """Hidden states with their routing: `[n, D]`, `[n, K]`, `[n, K]`.

    An expert id of E, the number of experts, asks for nothing.
    """

    hidden: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor

    def __len__(self) -> int:
        return len(self.hidden)

    def row_bytes(self, payload: Payload = _EXACT) -> RowBytes:
        """Of one of them in a message."""
        hidden_bytes = payload.row_bytes(self.hidden.shape[1], self.hidden.dtype)
        return RowBytes.of(hidden_bytes, self.weights)


State = TypeVar("State")  # frozen: all that combine must know of dispatch


class Dispatcher(Protocol[State]):
    """Two verbs; every rank runs both for every layer, whether it has tokens or not."""

    @property
    def name(self) -> str: ...

    def dispatch(self, layer: int, rows: Rows, tokens_by_rank: list[int]) -> tuple[Rows, State]:
        """The rows whose experts are here; `tokens_by_rank[g]` are those of rank g's forward."""

    def combine(self, output_RD: torch.Tensor, state: State) -> torch.Tensor:
        """`[T, D]`, from the weighted sums of those rows over the experts that are here."""
