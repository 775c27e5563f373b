"""The scalable solver: many starts, swap annealing, recombination, and small windows polished.

L layers, P items a layer, G GPUs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_runtime.placement.anneal import is_compiled, start_annealing
from moe_runtime.placement.cost_model import CostModel
from moe_runtime.placement.descent import descend, greedy_assignment, random_assignment
from moe_runtime.placement.polish import can_polish, polish
from moe_runtime.placement.recombine import recombine
from moe_runtime.placement.result import StoppedBy
from moe_runtime.placement.workers import Control, Job, run_jobs

Array = np.ndarray[Any, Any]

_SEGMENTS = 200  # temperatures of an annealing; between them it can stop
_COLDEST = 0.003  # in units of what an item pays, where hardly a swap is taken
_PENALTY = (
    0.5  # of load above the limit, in units of what a layer pays; rises tenfold while cooling
)
_PROPOSALS_PER_SWAP = 1625  # so often is each pair of a layer looked at, where that is affordable
_LEAST_GAIN = 2e-4  # of the objective: a round that brings less is the last
_NUMPY_SLOWNESS = 100  # proposals a second, compiled over numpy
_FINAL_PENALTY = 1e3  # so that no gain outweighs load above the limit


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchPlan:
    """How long to search. Measured on gpt-oss-20b (24 x 32) and on DeepSeek-V3's size (58 x 256).

    One long annealing gave .295 to .307 crossings on gpt-oss and 4 GPUs, twelve short ones .296 to
    .322, and .286 after recombination; further rounds from there .2856. From a descent on V3's size
    a start at 0.1 gains on 8 and 32 GPUs and loses on 64 (.738 to .748), so some start colder.
    """

    num_starts: int
    num_rounds: int
    runs_per_round: int
    proposals: int  # of one annealing
    hot: tuple[float, ...]  # first temperatures of the starts in turn; 1: what an item pays
    warm: float  # the same, of the rounds after the first
    is_greedy: bool  # start from coordinate descent; else at random

    @classmethod
    def for_model(cls, model: CostModel) -> "SearchPlan":
        items = model.num_layers * model.num_items
        is_large = items > 4096
        swaps = items * model.num_items / 2
        most = 30_000_000 if is_large else 20_000_000
        proposals = int(np.clip(_PROPOSALS_PER_SWAP * swaps, 100_000, most))
        if not is_compiled():
            proposals = max(proposals // _NUMPY_SLOWNESS, 5_000)
        return cls(
            num_starts=4 if is_large else 12,
            num_rounds=2 if is_large else 4,
            runs_per_round=4,
            proposals=proposals,
            hot=(0.03, 0.1) if is_large else (1.0,),
            warm=0.03 if is_large else 0.15,
            is_greedy=is_large and not model.is_replicated,
        )

    @property
    def num_pieces(self) -> int:
        """Units of the progress bar."""
        return (self.num_starts + self.num_rounds * self.runs_per_round) * _SEGMENTS


def search(
    model: CostModel,
    fallback: Array,
    *,
    seed: int,
    control: Control,
    num_processes: int,
    starts: tuple[Array, ...] = (),
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[Array, StoppedBy]:
    """The best assignment `[L, P]` found within the limit, and why the search ended.

    `fallback` obeys every constraint; it is the answer while nothing better does. `starts` are
    annealed beside the plan's own. The same seed gives the same answer unless time ran out.
    """
    plan = SearchPlan.for_model(model)
    total = plan.num_pieces + len(starts) * _SEGMENTS

    def report() -> None:
        if on_progress is not None:
            on_progress(min(control.done, total), total)

    def run(jobs: list[Job[Array]]) -> list[Array]:
        return run_jobs(jobs, control, num_processes=num_processes, on_progress=report)

    jobs = [_first_job(model, fallback, plan, seed, number) for number in range(plan.num_starts)]
    for number, gpu in enumerate(starts):
        jobs.append(_later_job(model, gpu, plan, seed + 500 + number))
    best = _best_of(model, fallback, run(jobs))
    for number in range(plan.num_rounds):
        if control.should_stop():
            break
        first = seed + 1000 * (number + 1)
        later = [_later_job(model, best, plan, first + i) for i in range(plan.runs_per_round)]
        before = model.objective(best)
        best = _best_of(model, best, run(later))
        if model.objective(best) > before * (1 - _LEAST_GAIN):
            break
    if can_polish(model) and not control.should_stop():
        best = polish(model, best, control)
    report()
    return best, control.stopped_by or StoppedBy.CONVERGED


def _best_of(model: CostModel, incumbent: Array, found: list[Array]) -> Array:
    """The best that can be put together from feasible assignments."""
    pool = [incumbent, *(gpu for gpu in found if model.is_within_limit(gpu))]
    pool.append(recombine(model, pool))
    return min(pool, key=model.objective)


def _first_job(
    model: CostModel, fallback: Array, plan: SearchPlan, seed: int, number: int
) -> Job[Array]:
    def job(control: Control) -> Array:
        own_seed = seed * 1_000_003 + number
        if model.is_replicated or control.should_stop():
            gpu = fallback
        elif plan.is_greedy:
            gpu = descend(model, greedy_assignment(model, own_seed))
        else:
            gpu = random_assignment(model, own_seed)
        hot = plan.hot[number % len(plan.hot)]
        return anneal(model, gpu, plan, hot, own_seed, control)

    return job


def _later_job(model: CostModel, gpu: Array, plan: SearchPlan, seed: int) -> Job[Array]:
    def job(control: Control) -> Array:
        return anneal(model, gpu, plan, plan.warm, seed, control)

    return job


def anneal(
    model: CostModel, gpu: Array, plan: SearchPlan, hot: float, seed: int, control: Control
) -> Array:
    """Cool from `hot` to a local optimum; told to stop, take the last step at once.

    Where the way led nowhere better, the answer is `gpu` itself.
    """
    layer_pays = _layer_scale(model)
    item_pays = layer_pays / model.num_items
    annealing = start_annealing(model, gpu, seed)
    per_layer = max(plan.proposals // (_SEGMENTS * model.num_layers), 1)
    is_limited = model.balance is not None
    for segment in range(_SEGMENTS):
        if control.should_stop():
            break
        progress = segment / (_SEGMENTS - 1)
        temperature = item_pays * hot * (_COLDEST / hot) ** progress
        penalty = _PENALTY * (0.1 + progress) * layer_pays if is_limited else 0.0
        annealing.sweep(per_layer, temperature, penalty)
        control.advance()
    penalty = _FINAL_PENALTY * layer_pays if is_limited else 0.0
    annealing.sweep(per_layer, 0.0, penalty)
    annealing.descend(penalty, max_rounds=3 if control.should_stop() else 30)
    found = annealing.gpu.copy()
    is_worse = not model.is_within_limit(found) or model.objective(gpu) < model.objective(found)
    return gpu if is_worse and model.is_within_limit(gpu) else found


def _layer_scale(model: CostModel) -> float:
    """What a layer pays when it is placed badly, in the objective's unit."""
    scale = float(model.chain.sum() * model.costs.max()) + model.price * model.num_layers
    if model.within is not None:
        scale += 0.5 * float(model.within.sum())
    if model.unary is not None:
        scale += float(np.ptp(model.unary, axis=1).sum())
    return max(scale / model.num_layers, 1e-12)
