"""Shares requests out among ranks, so that each meets the experts that its tokens use.

R requests, G ranks, V token ids.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from moe_runtime.placement.cocluster import DeviceTables

Array = np.ndarray[Any, Any]


def share_requests(requests: Sequence[Sequence[int]], tables: DeviceTables) -> list[int]:
    """The rank of each request, given its token ids; ranks get equally many, or one more.

    Sem-MoE (arXiv 2503.04398, algorithm 2) gives a request to the rank that most of its tokens
    belong to, run by run of G requests; here all requests are assigned at once, which is the
    maximum of the same sum. A token counts with its confidence, so an unseen one with 0.
    """
    G = tables.num_gpus
    pull_VG = np.stack(
        [(tables.token_confidence * (tables.token_group == gpu)).sum(axis=0) for gpu in range(G)],
        axis=1,
    )
    pull_RG = np.zeros((len(requests), G))
    for number, token_ids in enumerate(requests):
        ids = np.asarray(token_ids, np.int64)
        pull_RG[number] = pull_VG[ids[(ids >= 0) & (ids < len(pull_VG))]].sum(axis=0)
    even = len(requests) // G
    # Places that must be filled are worth more than all pull together; each rank has one that need
    # not be.
    must = np.repeat(np.arange(G), even)
    worth = np.hstack([pull_RG[:, must] + pull_RG.sum() + 1.0, pull_RG])
    request, place = linear_sum_assignment(worth, maximize=True)
    rank_of_place = np.concatenate([must, np.arange(G)])
    found = np.empty(len(requests), np.int64)
    found[request] = rank_of_place[place]
    return [int(rank) for rank in found]
