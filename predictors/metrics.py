"""How right a predictor was: recall, precision, batch recall and calibration.

N rows, L MoE layers, K experts a token, E experts a layer, B rows of a batch, C slots of a layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moe_runtime.predictors.counts import membership
from moe_runtime.trace_fields import Array

BATCH_SIZES = (1, 4, 16)
_BINS = 20
_BLOCK_ROWS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Over rows and layers of which something was said. `num_rows` counts row-layers.

    `recall` is the share of a token's true experts among the K most probable ones, `precision` the
    share of those K that are true (the same, unless a trace misses experts), `slot_recall` the
    share among the C most probable. `batch_recall[B]` is that of ExpertFlow (arXiv 2410.17954):
    of the experts that B tokens use together, the share in the union of their K most probable
    ones; `batch_chance[B]` = 1 - (1 - K/E)^B is what guessing reaches. `calibration_error` is the
    mean distance of what was said from what happened, in bins of what was said.
    """

    num_rows: int
    recall: float
    precision: float
    slot_recall: float
    calibration_error: float
    batch_recall: Mapping[int, float]
    batch_chance: Mapping[int, float]


def top_experts(probability: Array, number: int) -> Array:
    """`[..., number]` int16: the most probable experts, most probable first, low ids first."""
    order = np.argsort(-probability, axis=-1, kind="stable")
    found: Array = order[..., :number].astype(np.int16)
    return found


def score(probability: Array, topk: Array, *, num_slots: int, seed: int = 0) -> Score | None:
    """Compare `[N, L, E]`, NaN where nothing was said, with `[N, L, K]`; None where nothing was.

    Batches are drawn without replacement from the rows with `seed`, so that their tokens come from
    different sequences, as those that decode together do.
    """
    num_experts, top_k = probability.shape[-1], topk.shape[-1]
    sums = np.zeros(4)  # row-layers, recall, precision, recall at the budget
    bins = np.zeros((3, _BINS))  # how many were said, their sum, and how many happened
    for start in range(0, len(topk), _BLOCK_ROWS):
        said = probability[start : start + _BLOCK_ROWS].astype(np.float32)
        chosen = topk[start : start + _BLOCK_ROWS]
        is_said = ~np.isnan(said[..., 0]) & (chosen >= 0).any(-1)
        said, chosen = said[is_said], chosen[is_said]
        if not len(said):
            continue
        truth = membership(chosen, num_experts)
        ranked = top_experts(said, max(top_k, num_slots))
        right = np.take_along_axis(truth, ranked.astype(np.int64), -1)
        num_true = truth.sum(-1)
        hits = right[:, :top_k].sum(-1)
        sums += (
            len(said),
            (hits / num_true).sum(),
            (hits / top_k).sum(),
            (right[:, :num_slots].sum(-1) / num_true).sum(),
        )
        place = np.clip((said * _BINS).astype(np.int64), 0, _BINS - 1).ravel()
        for row, value in enumerate((None, said.ravel(), truth.ravel())):
            bins[row] += np.bincount(place, value, _BINS)
    if not sums[0]:
        return None
    count = max(bins[0].sum(), 1)
    batches = {size: _batch_recall(probability, topk, size, seed) for size in BATCH_SIZES}
    return Score(
        num_rows=int(sums[0]),
        recall=float(sums[1] / sums[0]),
        precision=float(sums[2] / sums[0]),
        slot_recall=float(sums[3] / sums[0]),
        calibration_error=float(np.abs(bins[1] - bins[2]).sum() / count),
        batch_recall={size: share for size, share in batches.items() if share is not None},
        batch_chance={size: 1 - (1 - top_k / num_experts) ** size for size in BATCH_SIZES},
    )


def _batch_recall(probability: Array, topk: Array, size: int, seed: int) -> float | None:
    """Of batches of rows of which something was said; None where there are too few for one."""
    num_experts, top_k = probability.shape[-1], topk.shape[-1]
    found, total = 0.0, 0
    for layer in range(probability.shape[1]):
        is_said = ~np.isnan(probability[:, layer, 0]) & (topk[:, layer] >= 0).any(-1)
        rows = np.random.default_rng(seed).permutation(np.flatnonzero(is_said))
        rows = rows[: len(rows) // size * size]
        for start in range(0, len(rows), _BLOCK_ROWS * size):
            block = rows[start : start + _BLOCK_ROWS * size]
            said = probability[block, layer].astype(np.float32)
            guess = membership(top_experts(said, top_k), num_experts)
            truth = membership(topk[block, layer], num_experts)
            guess, truth = (x.reshape(-1, size, num_experts).max(1) for x in (guess, truth))
            shares = (guess * truth).sum(-1) / truth.sum(-1)
            found += float(shares.sum())
            total += len(shares)
    return found / total if total else None
