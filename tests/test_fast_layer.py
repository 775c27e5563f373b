"""Laws of the fast layer: bits do not depend on arrival, and stay near the honest loop's."""

import random
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from moe_runtime import fast_layer
from moe_runtime.fast_layer import FastMath, most_kernel_rows
from moe_runtime.kernels.cpu.experts import CpuExperts
from moe_runtime.kernels.cpu.operation import Gate
from moe_runtime.layer import Accumulator, Dispatch, ExpertMath
from tests.honest_experts import honest_forward, parameter_shapes, random_routing, silu_gate
from tests.test_layer import RandomArrival

DIM, FFN = 40, 24
# Both round to bfloat16, the honest loop more often: a few times 2^-8 of the output's norm.
TOLERANCE = {torch.bfloat16: 3e-2, torch.float32: 1e-5}


def fast_math(dtype: torch.dtype, *, has_gate: bool) -> FastMath:
    kernel = CpuExperts.load(dtype)
    if kernel is None:
        pytest.skip(CpuExperts.status(dtype))
    math = ExpertMath(
        up_name="gate_up_proj" if has_gate else "up_proj",
        has_bias=False,
        is_transposed=False,
        apply_gate=silu_gate if has_gate else functional.relu,
        post_norm=None,
        accumulator=Accumulator.FLOAT32,
    )
    gate = Gate.SILU if has_gate else Gate.RELU
    layer = kernel.layer(dim=DIM, num_up=FFN * (1 + has_gate), ffn=FFN, gate=gate)
    return FastMath(layer.begin, math, kernel.level, most_rows=16)


class Arrival(RandomArrival):
    """Experts of one call are released together, after it."""

    def release(self, expert: int) -> None:
        assert expert in self.order
        self._released.add(expert)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("seed", range(40))
def test_bits_do_not_depend_on_arrival(seed: int, dtype: torch.dtype) -> None:
    """Law: whatever is ready when, the output has the same bits, and every expert is used once.

    Up to 60 tokens: some experts have more rows than the kernel takes.
    """
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    math = fast_math(dtype, has_gate=rng.random() < 0.7)
    num_experts, num_tokens = rng.randint(2, 8), rng.choice([1, 2, 9, 30, 60])
    shapes = parameter_shapes(math.torch_math, DIM, FFN)
    weights = [
        {
            name: (torch.randn(shape, generator=generator) * shape[1] ** -0.5).to(dtype)
            for name, shape in shapes.items()
        }
        for _ in range(num_experts)
    ]
    hidden_TD = torch.randn(num_tokens, DIM, generator=generator).to(dtype)
    index_TK, scores_TK = random_routing(rng, generator, num_tokens, num_experts)
    scores_TK = scores_TK.to(rng.choice([torch.float32, dtype]))
    dispatch = Dispatch.of(index_TK, scores_TK, num_experts)
    if not dispatch.experts:
        return
    expected = honest_forward(math.torch_math, weights, hidden_TD, index_TK, scores_TK)
    found = []
    for _ in range(4):
        access = Arrival(weights, rng)
        found.append(math.run(hidden_TD, dispatch, access))
        assert sorted(access.order) == dispatch.experts
        assert access._released == set(dispatch.experts)
    assert all(torch.equal(one, found[0]) for one in found)
    assert found[0].dtype == dtype
    error = (found[0].double() - expected.double()).norm()
    assert error <= TOLERANCE[dtype] * expected.double().norm()


@pytest.mark.parametrize(
    ("num_weights", "rows"),
    [(82_944, 128), (2_752_512, 72), (6_291_456, 31), (18_874_368, 16), (176_160_768, 16)],
)
def test_large_experts_leave_many_rows_to_torch(num_weights: int, rows: int) -> None:
    assert most_kernel_rows(num_weights) == rows


def test_prompts_whose_outputs_are_too_many_go_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: where outputs cannot all be held, torch computes experts one after the other."""
    math = fast_math(torch.float32, has_gate=True)
    monkeypatch.setattr(fast_layer, "MAX_HELD_BYTES", 0)
    shapes = parameter_shapes(math.torch_math, DIM, FFN)
    weights = [{name: torch.randn(shape) for name, shape in shapes.items()} for _ in range(3)]
    index_TK, scores_TK = torch.tensor([[0, 2], [1, 2]]), torch.rand(2, 2)
    hidden_TD = torch.randn(2, DIM)
    dispatch = Dispatch.of(index_TK, scores_TK, 3)

    def refuse(*_: object) -> None:
        raise AssertionError("the kernel was called")

    found = replace(math, begin=refuse).run(hidden_TD, dispatch, Arrival(weights, random.Random(0)))
    assert torch.equal(
        found, honest_forward(math.torch_math, weights, hidden_TD, index_TK, scores_TK)
    )
