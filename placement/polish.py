"""Improves a placement by solving windows of two or three layers exactly, all others fixed.

L layers, P items a layer, G GPUs.
"""

import time
from dataclasses import replace
from typing import Any

import numpy as np

from moe_runtime.errors import MissingPackageError
from moe_runtime.placement.cost_model import CostModel
from moe_runtime.placement.milp import is_programme, solve_programme
from moe_runtime.placement.workers import Control

Array = np.ndarray[Any, Any]

# Variables z of a window: 12 experts on 4 GPUs in two layers have 576 and close in about a quarter
# of a second; 16 on 4 have 1024, and within a load limit some of theirs take ten.
_MOST_FLOWS = 600
_WINDOWS = (3, 2)  # layers; the longer one where it is small enough
_MOST_SECONDS = 5.0  # for all windows
_WINDOW_SECONDS = 1.0  # an interrupt waits for the window that is being solved
_LEAST_GAIN = 1e-9  # what is less may be the solver's tolerance


def can_polish(model: CostModel) -> bool:
    """Whether a window is a programme that the integer solver knows and closes soon."""
    return is_programme(model) and model.num_layers > 1 and _length(model) > 0


def polish(model: CostModel, gpu: Array, control: Control) -> Array:
    """`gpu` `[L, P]` after windows that gain; never dearer, and within the limit if it was.

    Windows overlap by all but a layer and go round until none gains, time runs out or an interrupt
    comes, which is recorded in `control`. The layers beside a window enter as prices of GPUs for
    the items of its ends. What two or three layers gain only together, no swap alone finds.
    """
    until = time.monotonic() + min(control.remaining_seconds(), _MOST_SECONDS)
    gpu = gpu.copy()
    starts = range(model.num_layers - _length(model) + 1)
    first = since_gain = 0
    try:
        while since_gain < len(starts) and time.monotonic() < until:
            layers = slice(first, first + _length(model))
            better = _solved(_window(model, gpu, layers), gpu[layers], until)
            since_gain += 1
            if better is not None:
                gpu[layers] = better
                since_gain = 0
            first = (first + 1) % len(starts)
    except MissingPackageError:  # neither HiGHS nor CBC: the placement stays as it is
        pass
    except KeyboardInterrupt:
        control.interrupt()
    return gpu


def _length(model: CostModel) -> int:
    """Layers of a window; 0 where even the shortest is too large."""
    flows = model.num_items**2 * model.num_gpus
    fitting = (n for n in _WINDOWS if (n - 1) * flows <= _MOST_FLOWS)
    return min(next(fitting, 0), model.num_layers)


def _solved(window: CostModel, gpu: Array, until: float) -> Array | None:
    """A better assignment of the window than `gpu`, if one is found."""
    seconds = min(max(until - time.monotonic(), 0.1), _WINDOW_SECONDS)
    found = solve_programme(window, solver=None, seconds=seconds, warm=gpu).gpu
    if found is None or not window.is_within_limit(found):
        return None
    is_better = window.objective(found) < window.objective(gpu) - _LEAST_GAIN
    return found if is_better else None


def _window(model: CostModel, gpu: Array, layers: slice) -> CostModel:
    """The model of `layers`, whose ends pay for their distance to the fixed neighbours."""
    first, stop = layers.start, layers.stop
    unary = np.zeros((stop - first, model.num_gpus, model.num_items))
    if model.unary is not None:
        unary += model.unary[layers]
    if first > 0:
        unary[0] += model.paid_beside(first, first - 1, gpu[first - 1])
    if stop < model.num_layers:
        unary[-1] += model.paid_beside(stop - 1, stop, gpu[stop])
    return replace(
        model,
        chain=model.chain[first : stop - 1],
        unary=unary,
        load=model.load[layers],
        expert=model.expert[layers],
        replicas=model.replicas[layers],
        offset=0.0,
    )
