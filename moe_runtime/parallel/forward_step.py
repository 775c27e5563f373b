"""What ranks agree on before each forward: who has how many tokens, and what any of them wishes.

T tokens of this rank, K top-k, D model dim.
"""

from dataclasses import dataclass
from enum import IntFlag

import torch

from moe_runtime.errors import ParallelError
from moe_runtime.parallel.dispatcher import Rows
from moe_runtime.parallel.ledger import CONTROL, Ledger

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Wish(IntFlag):
    """What a rank may ask of all, between two forwards."""

    STOP = 1
    MIGRATE = 2


@dataclass(frozen=True, slots=True)
class Step:
    """One forward of the ranks that have tokens; the others take part without any."""

    tokens_by_rank: list[int]
    extras_by_rank: list[int]  # rows that stand behind those of tokens, in what follows
    wishes: Wish  # of any rank
    empty: Rows  # no rows, in the sizes and dtypes of this forward

    @property
    def is_idle(self) -> bool:
        return not any(self.tokens_by_rank)


def agree_on_step(ledger: Ledger, rows: Rows | None, *, num_extra: int, wishes: Wish) -> Step:
    """The next forward, as all ranks have it; `rows` are this rank's, None if it is done.

    Collective. Raises ParallelError where rows differ in shape.
    """
    mine = [0, wishes, num_extra, 0, 0, 0, 0, 0]
    if rows is not None:
        mine = [len(rows), wishes, num_extra, *_shape_code(rows)]
    sent = torch.tensor(mine, dtype=torch.int32, device=ledger.device)
    heard = ledger.all_gather(CONTROL, sent).tolist()  # sync: the host plans the forward
    shapes = {tuple(line[3:]) for line in heard if line[0]}
    if len(shapes) > 1:
        raise ParallelError(
            "ranks disagree on the shape of rows (model dim, top-k and dtypes, as numbers): "
            f"{sorted(shapes)}; load the same model with the same dtype on every rank"
        )
    of_all = Wish(0)
    for line in heard:
        of_all |= Wish(line[1])
    shape = next(iter(shapes), (0, 0, 0, 0, 0))
    return Step(
        tokens_by_rank=[line[0] for line in heard],
        extras_by_rank=[line[2] for line in heard],
        wishes=of_all,
        empty=_empty_rows(shape, ledger.device),
    )


def _shape_code(rows: Rows) -> tuple[int, int, int, int, int]:
    if rows.hidden.dtype not in _DTYPES or rows.weights.dtype not in _DTYPES:
        raise ParallelError(
            f"hidden states are {rows.hidden.dtype} and router weights {rows.weights.dtype}; "
            "expert parallelism moves floats of 16, 32 or 64 bits"
        )
    return (
        rows.hidden.shape[1],
        rows.index.shape[1],
        _DTYPES.index(rows.hidden.dtype),
        _DTYPES.index(rows.weights.dtype),
        int(rows.index.dtype == torch.int64),
    )


def _empty_rows(shape: tuple[int, ...], device: torch.device) -> Rows:
    model_dim, top_k, hidden, weights, is_long = shape
    return Rows(
        torch.empty((0, model_dim), dtype=_DTYPES[hidden], device=device),
        torch.empty((0, top_k), dtype=torch.int64 if is_long else torch.int32, device=device),
        torch.empty((0, top_k), dtype=_DTYPES[weights], device=device),
    )
