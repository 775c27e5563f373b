"""Logistic regression of few features, by Newton's method."""

import numpy as np

from moe_runtime.trace_fields import Array

MAX_LOGIT = 15.0  # beyond it a float32 probability is 0 or 1
_STEPS = 25
_DAMPING = 1e-3


def fit_logistic(features: Array, truth: Array) -> Array:
    """`[F]` float32: the weights that say `truth` `[N]` of `[N, F]` best, lightly damped."""
    features = features.astype(np.float64)
    weights = np.zeros(features.shape[1])
    damping = _DAMPING * np.eye(features.shape[1])
    for _ in range(_STEPS):
        chance = sigmoid(features @ weights)
        slope = features.T @ (truth - chance) - damping @ weights
        bend = (features * (chance * (1 - chance))[:, None]).T @ features + damping
        change = np.clip(np.linalg.solve(bend, slope), -5, 5)
        weights += change
        if np.abs(change).max() < 1e-6:
            break
    return weights.astype(np.float32)


def sigmoid(logits: Array) -> Array:
    found: Array = 1 / (1 + np.exp(-np.clip(logits, -MAX_LOGIT, MAX_LOGIT)))
    return found


def logit(probability: Array) -> Array:
    """The inverse of `sigmoid`, within its limits."""
    least = 1 / (1 + np.exp(MAX_LOGIT))
    chance = np.clip(probability, least, 1 - least)
    found: Array = np.log(chance / (1 - chance)).astype(np.float32)
    return found
