"""Splits sequences into two batches that activate few experts, after ExpertFlow's token scheduler.

N sequences, P places: the (layer, expert) pairs of the model, in one row.
"""

import numpy as np

from moe_runtime.trace_fields import Array

_MAX_ROUNDS = 20  # of 2-means; it settles after two or three


def activated(path_NP: Array, is_second_N: Array) -> int:
    """Experts that the two batches use, each counted in each batch that uses it.

    Sum over layers and experts of R1 + R2, R_k the union of the paths of batch k (ExpertFlow,
    arXiv 2410.17954, equation 2). `path_NP` and `is_second_N` are bool.
    """
    return int(path_NP[is_second_N].any(0).sum() + path_NP[~is_second_N].any(0).sum())


def split_in_two(path_NP: Array) -> Array:
    """`[N]` bool, true for the second batch: halves of equal size that activate few experts.

    Equal-size 2-means on the Hamming similarity of the paths (ExpertFlow, section 3.3), and then
    exchanges: dissimilarity is not what is to be made small. Odd N: the first batch has one more.
    The same paths give the same halves.
    """
    path_NP = np.asarray(path_NP, np.bool_)
    num_sequences = len(path_NP)
    if num_sequences < 2:
        return np.zeros(num_sequences, np.bool_)
    similarity_NN = _similarity(path_NP)
    centre, far = np.unravel_index(int(similarity_NN.argmin()), similarity_NN.shape)
    is_second_N = _nearer_half(similarity_NN, int(centre), int(far))
    for _ in range(_MAX_ROUNDS):
        centres = [_medoid(similarity_NN, members) for members in (~is_second_N, is_second_N)]
        found_N = _nearer_half(similarity_NN, *centres)
        if (found_N == is_second_N).all():
            break
        is_second_N = found_N
    return exchange(path_NP, is_second_N)


def exchange(path_NP: Array, is_second_N: Array, price: float = 0.0) -> Array:
    """`is_second_N` after exchanges of two sequences, each the one that saves most experts.

    Ends when none saves more than `price` experts, which is what an exchange costs.
    """
    path_NP, is_second_N = np.asarray(path_NP, np.bool_), is_second_N.copy()
    while is_second_N.any() and not is_second_N.all():
        first, second = np.flatnonzero(~is_second_N), np.flatnonzero(is_second_N)
        change_AB = _changes(path_NP[first], path_NP[second])
        change_AB += _changes(path_NP[second], path_NP[first]).T
        a, b = np.unravel_index(int(change_AB.argmin()), change_AB.shape)
        if change_AB[a, b] >= -price:
            break
        is_second_N[[first[a], second[b]]] = True, False
    return is_second_N


def _similarity(path_NP: Array) -> Array:
    """`[N, N]`: 1 - Hamming distance / P."""
    ones_NP = path_NP.astype(np.float32)
    sizes_N = ones_NP.sum(1)
    shared_NN = ones_NP @ ones_NP.T
    distance_NN = sizes_N[:, None] + sizes_N[None] - 2 * shared_NN
    similarity: Array = 1.0 - distance_NN / max(path_NP.shape[1], 1)
    return similarity


def _nearer_half(similarity_NN: Array, first: int, second: int) -> Array:
    """The half of the sequences that leans most to `second`."""
    lean_N = similarity_NN[second] - similarity_NN[first]
    is_second_N = np.zeros(len(lean_N), np.bool_)
    is_second_N[np.argsort(-lean_N, kind="stable")[: len(lean_N) // 2]] = True
    return is_second_N


def _medoid(similarity_NN: Array, is_member_N: Array) -> int:
    """The member with the highest mean similarity to the members."""
    members = np.flatnonzero(is_member_N)
    return int(members[similarity_NN[np.ix_(members, members)].sum(1).argmax()])


def _changes(path_AP: Array, other_BP: Array) -> Array:
    """`[A, B]`: experts more in the union of `path_AP` when row `a` gives way to other's `b`."""
    counts_P = path_AP.sum(0)
    only_AP = (path_AP & (counts_P == 1)).astype(np.float32)  # lost with its row
    other = other_BP.astype(np.float32)
    added_B = other @ (counts_P == 0).astype(np.float32)
    change: Array = added_B[None] - only_AP.sum(1)[:, None] + only_AP @ other.T
    return change
