"""What the cache simulator says of the rows that ours replayed."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moe_runtime.measure.bench.contestant_process import Turn
from moe_runtime.measure.bench.rounds import Schedule
from moe_runtime.simulate.replay import simulate
from moe_runtime.trace import Trace


def simulated_counts(
    rows: Trace,
    turns: Sequence[Turn],
    schedule: Schedule,
    *,
    num_gate_tokens: int,
    num_layers: int,
    slots: int,
    policy: str,
) -> tuple[int, int]:
    """(hits, misses) of the counted rounds, for the very accesses that were made.

    Those are the gate's tokens, then each round's as far as its turn came; what happened before the
    counted rounds fills the cache. No policy of the runtime sees the future, so what the counted
    rounds add is the difference between the whole and the beginning.
    """
    spans = [(0, num_gate_tokens)]
    spans += [(schedule.first_row(index), turn.num_tokens) for index, turn in enumerate(turns)]
    counted_from = 1 + schedule.first_counted
    whole = _counts(rows, _places(spans), num_layers, slots, policy)
    start = _counts(rows, _places(spans[:counted_from]), num_layers, slots, policy)
    return whole[0] - start[0], whole[1] - start[1]


def _places(spans: Sequence[tuple[int, int]]) -> npt.NDArray[np.intp]:
    return np.concatenate([np.arange(first, first + count) for first, count in spans])


def _counts(
    rows: Trace, places: npt.NDArray[np.intp], num_layers: int, slots: int, policy: str
) -> tuple[int, int]:
    topk = rows.topk[places % rows.num_tokens, :num_layers]
    trace = Trace.of({"topk": topk}, source="replayed rows", num_experts=rows.num_experts)
    result = simulate(trace, slots=[slots], policies=[policy])[0]
    return result.hits, result.misses
