"""Laws of a layer: rows and sums in the reference's order, whatever arrives first."""

import random
from collections.abc import Sequence

import pytest
import torch
from torch.nn import functional

from moe_runtime import layer
from moe_runtime.engine import Weights
from moe_runtime.layer import Accumulator, Dispatch, ExpertMath, RowKernel, run_experts
from tests.honest_experts import honest_forward, parameter_shapes, random_math, random_routing

# T tokens, K top-k, E experts, D model dim, R = T * K rows


@pytest.mark.parametrize("seed", range(100))
def test_rows_are_in_the_order_of_the_reference(seed: int) -> None:
    """Law: each expert's rows are those of `torch.where` on the reference's mask, in its order."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    num_experts, num_tokens = rng.randint(1, 9), rng.randint(1, 30)
    index_TK, scores_TK = random_routing(rng, generator, num_tokens, num_experts)
    dispatch = Dispatch.of(index_TK, scores_TK, num_experts)
    mask_EKT = functional.one_hot(index_TK, num_classes=num_experts + 1).permute(2, 1, 0)
    hit = mask_EKT[:num_experts].sum(dim=(-1, -2)).nonzero().flatten().tolist()
    assert dispatch.experts == hit
    for i, expert in enumerate(hit):
        position_n, token_n = torch.where(mask_EKT[expert])
        rows = slice(dispatch.bounds[i], dispatch.bounds[i + 1])
        assert torch.equal(dispatch.token_R[rows], token_n)
        assert torch.equal(dispatch.weight_R1[rows], scores_TK[token_n, position_n, None])


@pytest.mark.parametrize("shape", [(0, 2), (3, 0)])
def test_nothing_to_route(shape: tuple[int, int]) -> None:
    """Law: no token, or no choice, means no expert."""
    dispatch = Dispatch.of(torch.empty(shape, dtype=torch.long), torch.empty(shape), 4)
    assert dispatch.experts == []


def test_only_sentinels() -> None:
    """Law: rows of other ranks' experts are nobody's."""
    dispatch = Dispatch.of(torch.full((3, 2), 4), torch.ones(3, 2), 4)
    assert dispatch.experts == []


class RandomArrival:
    """Experts that become ready in random order; counts and checks what is asked of it."""

    def __init__(self, weights: list[Weights], rng: random.Random) -> None:
        self.max_together = len(weights)
        self.order: list[int] = []
        self._weights = weights
        self._rng = rng
        self._released: set[int] = set()

    def is_ready(self, expert: int) -> bool:
        assert expert not in self._released
        return self._rng.random() < 0.3

    def weights(self, expert: int) -> Weights:
        assert expert not in self.order, "used twice"
        self.order.append(expert)
        return self._weights[expert]

    def release(self, expert: int) -> None:
        assert self.order[-1] == expert
        self._released.add(expert)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(40))
def test_bits_do_not_depend_on_arrival(seed: int, dtype: torch.dtype) -> None:
    """Law: for every combination of flags the output is the honest loop's, bit for bit."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    num_experts, num_tokens = rng.randint(2, 8), rng.randint(1, 30)
    math = random_math(rng)
    weights = [
        {
            name: torch.randn(shape, generator=generator).to(dtype)
            for name, shape in parameter_shapes(math, 16, 24).items()
        }
        for _ in range(num_experts)
    ]
    hidden_TD = torch.randn(num_tokens, 16, generator=generator).to(dtype)
    index_TK, scores_TK = random_routing(rng, generator, num_tokens, num_experts)
    scores_TK = scores_TK.to(rng.choice([torch.float32, dtype]))
    expected = honest_forward(math, weights, hidden_TD, index_TK, scores_TK)
    dispatch = Dispatch.of(index_TK, scores_TK, num_experts)
    for _ in range(5):
        access = RandomArrival(weights, rng)
        found = run_experts(math, hidden_TD, dispatch, access)
        assert sorted(access.order) == dispatch.experts
        assert torch.equal(found, expected)
        assert found.dtype == hidden_TD.dtype


def test_held_outputs_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: with no room for early outputs, experts run strictly in order."""
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    math = random_math(rng)
    weights = [
        {n: torch.randn(s, generator=generator) for n, s in parameter_shapes(math, 8, 8).items()}
        for _ in range(6)
    ]
    index_TK = torch.rand(4, 6, generator=generator).argsort(-1)
    dispatch = Dispatch.of(index_TK, torch.rand(4, 6, generator=generator), 6)
    hidden_TD = torch.randn(4, 8, generator=generator)

    def orders() -> set[tuple[int, ...]]:
        found = set()
        for _ in range(20):
            access = RandomArrival(weights, rng)
            run_experts(math, hidden_TD, dispatch, access)
            found.add(tuple(access.order))
        return found

    assert len(orders()) > 1
    monkeypatch.setattr(layer, "MAX_HELD_BYTES", 0)
    assert orders() == {tuple(range(6))}


def test_accumulator_dtypes() -> None:
    """Law: the three ways to add up are the hidden dtype, the router's, and float32."""
    dtypes = {a: a.dtype(torch.bfloat16, torch.float16) for a in Accumulator}
    assert dtypes == {
        Accumulator.HIDDEN: torch.bfloat16,
        Accumulator.ROUTER: torch.float16,
        Accumulator.FLOAT32: torch.float32,
    }


@pytest.mark.parametrize("max_together", [1, 2, 8])
def test_no_more_experts_are_held_than_have_room(max_together: int) -> None:
    """Law: experts unpacked into little room go in groups that fit it, with equal bits."""
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)

    def product(weights: Sequence[torch.Tensor], x_kK: torch.Tensor) -> torch.Tensor:
        rows_kK = x_kK.expand(len(weights), -1)
        return torch.stack([functional.linear(x, w) for x, w in zip(rows_kK, weights, strict=True)])

    math = ExpertMath(
        up_name="up_proj", has_bias=False, is_transposed=False, apply_gate=torch.relu,
        post_norm=None, accumulator=Accumulator.HIDDEN,
        row_kernel=RowKernel(product, product, torch.get_num_threads()),
    )  # fmt: skip
    weights = [
        {n: torch.randn(s, generator=generator) for n, s in parameter_shapes(math, 8, 8).items()}
        for _ in range(8)
    ]
    hidden_TD = torch.randn(1, 8, generator=generator)
    index_TK = torch.randperm(8, generator=generator).unsqueeze(0)
    scores_TK = torch.rand(1, 8, generator=generator)
    dispatch = Dispatch.of(index_TK, scores_TK, 8)
    access = LittleRoom(weights, rng)
    access.max_together = max_together
    found = run_experts(math, hidden_TD, dispatch, access)
    assert torch.equal(found, honest_forward(math, weights, hidden_TD, index_TK, scores_TK))
    assert access.most_held == max_together


class LittleRoom(RandomArrival):
    """Experts that are all ready; counts how many are held at a time."""

    def __init__(self, weights: list[Weights], rng: random.Random) -> None:
        super().__init__(weights, rng)
        self.most_held = 0

    def is_ready(self, expert: int) -> bool:
        return True

    def weights(self, expert: int) -> Weights:
        found = super().weights(expert)
        self.most_held = max(self.most_held, len(self.order) - len(self._released))
        return found

    def release(self, expert: int) -> None:
        self._released.add(expert)
