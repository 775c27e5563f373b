"""How much faster experts compute from fewer bytes: packed and quantised rows against bfloat16."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from moe_runtime.kernels.cpu.dequant import load_dequantizer
from moe_runtime.kernels.cpu.experts_layer import CpuLayer, ExpertsStep
from moe_runtime.kernels.cpu.operation import Gate
from moe_runtime.kernels.quantise import QUANTISED_DTYPES
from moe_runtime.kernels.scaled_blocks import ScaledFormat, ScaledWeights
from moe_runtime.measure.bench.expert_steps import few_rows, measured_kernel
from moe_runtime.measure.bench.form_pool import FormExpert, FormPool
from moe_runtime.measure.bench.presets import Preset
from moe_runtime.measure.spread import Spread

_REPEATS = 4  # steps of each form a round
_SCALED: tuple[ScaledFormat, ...] = ("fp8", "mxfp4")
_FORMS = ("packed", *QUANTISED_DTYPES, *_SCALED)
_FIRST = ", dequantised first"  # into memory of its own, an expert at a time, and multiplied there

# A step of these experts with so many rows each.
_Run = Callable[[list[FormExpert], int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class FormSpeed:
    """Tokens through experts, at most two rows each.

    `speedup` is over bfloat16 rows in the same round, `share` of the rate at which the bytes of
    this form were read right before.
    """

    shape: str
    form: str
    tokens: int
    num_experts: int
    share_of_bytes: float
    microseconds: Spread
    bfloat16_microseconds: Spread
    speedup: Spread
    share: Spread


def measure_forms(
    preset: Preset, *, rounds: int, on_round: Callable[[int, int], None]
) -> list[FormSpeed]:
    """All forms take turns on the same weights and threads, on bytes that no cache still has."""
    kernel, (dim, ffn) = measured_kernel(), preset.expert_sizes()
    pools = {form: FormPool(form, dim, ffn, preset.top_k) for form in ("bfloat16", *_FORMS)}
    layer = kernel.layer(dim=dim, ffn=ffn, num_up=2 * ffn, gate=Gate.SILU)
    steps: dict[str, tuple[FormPool, _Run]] = {
        form: (pool, _in_place(layer)) for form, pool in pools.items()
    }
    steps |= {form + _FIRST: (pools[form], _dequantised(layer, form)) for form in _SCALED}
    most = pools["bfloat16"].num_experts // 2
    kinds = [(tokens, min(n, most), rows_each) for tokens, n, rows_each in few_rows(preset)]
    times: dict[tuple[str, int], list[float]] = {
        (form, t): [] for form in steps for t, _, _ in kinds
    }
    reads: dict[tuple[str, int], list[float]] = {key: [] for key in times}
    for done in range(rounds + 1):  # the first warms up
        for tokens, num_experts, rows_each in kinds:
            for form, (pool, run) in steps.items():
                part = pool.next_bytes(num_experts)
                start = time.perf_counter()
                kernel.read(part)
                reading = time.perf_counter() - start
                chosen = [pool.next(num_experts) for _ in range(_REPEATS)]
                start = time.perf_counter()
                for experts in chosen:
                    run(experts, rows_each)
                running = time.perf_counter() - start
                if done:
                    reads[form, tokens].append(reading)
                    times[form, tokens].append(running / _REPEATS)
        on_round(done, rounds)
    return [
        FormSpeed(
            shape=preset.name,
            form=form,
            tokens=tokens,
            num_experts=num_experts,
            share_of_bytes=pool.expert_bytes / pools["bfloat16"].expert_bytes,
            microseconds=_microseconds(times[form, tokens]),
            bfloat16_microseconds=_microseconds(times["bfloat16", tokens]),
            speedup=_ratio(times["bfloat16", tokens], times[form, tokens]),
            share=_ratio(reads[form, tokens], times[form, tokens]),
        )
        for form, (pool, _) in steps.items()
        for tokens, num_experts, _ in kinds
        if form != "bfloat16"
    ]


def _in_place(layer: CpuLayer) -> _Run:
    def run(experts: list[FormExpert], rows_each: int) -> None:
        step, rows = _begin(layer, len(experts), rows_each)
        step.run([e.up for e in experts], [e.down for e in experts], rows, is_last=True)

    return run


def _dequantised(layer: CpuLayer, form: ScaledFormat) -> _Run:
    """As slots with room for one expert do."""
    up, down = (torch.empty(s, dtype=torch.bfloat16) for s in (layer.up_shape, layer.down_shape))
    dequantizer = load_dequantizer()

    def run(experts: list[FormExpert], rows_each: int) -> None:
        step, rows = _begin(layer, len(experts), rows_each)
        for expert, bounds in zip(experts, rows, strict=True):
            for (part,), room in zip(expert.parts, (up, down), strict=True):
                assert part.scales is not None
                weights = ScaledWeights(format=form, values=part.rows, scales=part.scales)
                dequantizer.run(weights, room)
            step.run([up], [down], [bounds], is_last=bounds is rows[-1])

    return run


def _begin(
    layer: CpuLayer, num_experts: int, rows_each: int
) -> tuple[ExpertsStep, list[tuple[int, int]]]:
    """A step of experts that all have the same tokens, and the rows of each."""
    num_rows = num_experts * rows_each
    x_TD = torch.full((rows_each, layer.up_shape[1]), 0.01, dtype=torch.bfloat16)
    weight_R = torch.full((num_rows,), 1 / num_experts)
    step = layer.begin(x_TD, torch.arange(num_rows) % rows_each, weight_R)
    return step, [(begin, begin + rows_each) for begin in range(0, num_rows, rows_each)]


def _microseconds(seconds: list[float]) -> Spread:
    return Spread.of([value * 1e6 for value in seconds])


def _ratio(above: list[float], below: list[float]) -> Spread:
    return Spread.of([a / b for a, b in zip(above, below, strict=True)])
