"""Improves a placement by solving windows of two or three layers exactly, all others fixed."""

from dataclasses import replace
from typing import Any

import numpy as np

from moe_runtime.placement.cost_model import CostModel
from moe_runtime.placement.milp import solve_programme
from moe_runtime.placement.workers import Control

Array = np.ndarray[Any, Any]

_MAX_VARIABLES = 20_000  # of a window; beyond, HiGHS does not close one in seconds
_WINDOW = 2  # layers, or 3 where they are small


def can_polish(model: CostModel) -> bool:
    """Whether a window is a programme that the integer solver knows and closes."""
    is_known = model.is_flat and not model.is_replicated and model.within is None
    return is_known and not model.price and _variables(model, _WINDOW) <= _MAX_VARIABLES


def polish(model: CostModel, gpu: Array, control: Control, *, solver: str | None = None) -> Array:
    """Slide a window over the layers once; never raises the objective or breaks the limit.

    The layers beside the window enter as a price of each GPU for each item of its ends.
    """
    length = _WINDOW + 1 if _variables(model, _WINDOW + 1) <= _MAX_VARIABLES else _WINDOW
    length = min(length, model.num_layers)
    gpu = gpu.copy()
    for first in range(model.num_layers - length + 1):
        if control.should_stop():
            break
        layers = slice(first, first + length)
        window = _window(model, gpu, layers)
        found = solve_programme(window, solver=solver, control=control, warm=gpu[layers]).gpu
        if found is None or not window.is_within_limit(found):
            continue
        if window.objective(found) < window.objective(gpu[layers]) - 1e-12:
            gpu[layers] = found
    return gpu


def _variables(model: CostModel, length: int) -> int:
    return (length - 1) * model.num_items**2 * model.num_gpus


def _window(model: CostModel, gpu: Array, layers: slice) -> CostModel:
    """The model of `layers`, whose ends pay for their distance to the fixed neighbours."""
    window = model.select(layers)
    L, G, P = window.num_layers, window.num_gpus, window.num_items
    unary = np.zeros((L, G, P)) if window.unary is None else window.unary.copy()
    if layers.start > 0:
        unary[0] += model.costs[gpu[layers.start - 1]].T @ model.chain[layers.start - 1]
    if layers.stop < model.num_layers:
        unary[-1] += model.costs[:, gpu[layers.stop]] @ model.chain[layers.stop - 1].T
    return replace(window, unary=unary)
