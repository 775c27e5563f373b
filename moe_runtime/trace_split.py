"""Splits a trace into tokens to learn from and tokens to be judged by, never within a sequence."""

import numpy as np

from moe_runtime.errors import TraceError
from moe_runtime.trace import Trace

_SEED = 0  # the split is the trace's own: other options must not change what is compared


def split_by_sequence(trace: Trace, share: float) -> tuple[Trace, Trace | None]:
    """(to learn from, held out): about `share` of the tokens of each domain, in whole sequences.

    Neighbouring tokens of a sequence leak, so none is cut. In each domain, sequences are held out
    in an order drawn once and for all, until they have at least `share` of its tokens; one sequence
    stays to learn from. Without a domain of two sequences nothing is held out.
    """
    if not 0 <= share < 1:
        raise TraceError(f"the share held out is {share}; it must be from 0 to less than 1")
    _, first_row, sequence, num_tokens = np.unique(
        trace.sequence_id, return_index=True, return_inverse=True, return_counts=True
    )
    domains = np.zeros(len(first_row), np.int64)
    if trace.domain is not None:  # a sequence has the domain of its first row
        domains = np.unique(trace.domain[first_row], return_inverse=True)[1]
    order = np.random.default_rng(_SEED).permutation(len(first_row))
    is_held_out = np.zeros(len(first_row), np.bool_)
    for domain in np.unique(domains):
        mine = order[domains[order] == domain]
        before = np.cumsum(num_tokens[mine]) - num_tokens[mine]
        is_wanted = before < share * num_tokens[mine].sum()
        is_held_out[mine[:-1][is_wanted[:-1]]] = True
    if not is_held_out.any():
        return trace, None
    rows = is_held_out[sequence]
    return trace.select(~rows), trace.select(rows)
