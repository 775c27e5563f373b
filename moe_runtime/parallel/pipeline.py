"""Dispatch, compute and combine of one layer in chunks, messages beside computing.

T tokens of this rank, D model dim, r chunks.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from moe_runtime.parallel.dispatcher import Dispatcher, Rows

ComputeRows = Callable[[Rows], torch.Tensor]  # `[R, D]` of the rows that are here


def run_in_chunks(
    dispatcher: Dispatcher[Any],
    layer: int,
    rows: Rows,
    tokens_by_rank: Sequence[int] | None,
    compute: ComputeRows,
    *,
    degree: int,
) -> torch.Tensor:
    """`[T, D]` by `degree` chunks of every rank's tokens; `degree` is the same on all ranks.

    All messages run on one thread, every chunk's dispatch before the first combine, as FSMoE's
    forms assume (arXiv 2501.10714, section 5): so their order is the same on all ranks, and a chunk
    is computed while others travel. A chunk that is empty on all ranks is left out, where it is
    known how many tokens each has.
    """

    def compute_any(here: Rows) -> torch.Tensor:
        return compute(here) if len(here) else here.hidden

    if tokens_by_rank is not None:
        degree = min(degree, max(tokens_by_rank))
    known = list(tokens_by_rank or ())
    if degree <= 1:
        here, state = dispatcher.dispatch(layer, rows, known)
        return dispatcher.combine(compute_any(here), state)
    chunks = [
        (
            _part(rows, len(rows) * i // degree, len(rows) * (i + 1) // degree),
            [n * (i + 1) // degree - n * i // degree for n in known],
        )
        for i in range(degree)
    ]
    has_grad, infers = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def in_mode(function: Callable[..., Any], *arguments: Any) -> Any:
        with torch.inference_mode(infers), torch.set_grad_enabled(has_grad):  # of this thread
            return function(*arguments)

    with ThreadPoolExecutor(1, "messages") as lane:
        try:
            sent = [
                lane.submit(in_mode, dispatcher.dispatch, layer, part, tokens)
                for part, tokens in chunks
            ]
            returned = []
            for one in sent:
                here, state = one.result()
                output = compute_any(here)
                returned.append(lane.submit(in_mode, dispatcher.combine, output, state))
            return torch.cat([one.result() for one in returned])
        except BaseException:
            lane.shutdown(wait=False, cancel_futures=True)
            raise


def _part(rows: Rows, begin: int, end: int) -> Rows:
    return Rows(rows.hidden[begin:end], rows.index[begin:end], rows.weights[begin:end])
