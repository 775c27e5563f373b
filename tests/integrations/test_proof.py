"""Laws of the proof: the fast loop runs only where it equals the family's own forward."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.integrations.moe import use_experts_implementation

import moe_runtime
from moe_runtime.integrations.transformers.proof import prove_math
from moe_runtime.layer import Accumulator

NUM_EXPERTS, MODEL_DIM, FFN_DIM, TOP_K = 5, 16, 24, 2
CPU = torch.device("cpu")

Add = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def fake_experts(
    accumulator: Callable[[torch.Tensor, torch.Tensor], torch.dtype],
    factor: float = 1.0,
    names: tuple[str, str, str] = ("hidden_states", "top_k_index", "top_k_weights"),
    extra: bool = False,
) -> type[nn.Module]:
    """An experts class as transformers writes them, that adds in the dtype `accumulator` gives."""

    class FakeExperts(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.num_experts = NUM_EXPERTS
            self.gate_up_proj = nn.Parameter(torch.empty(NUM_EXPERTS, 2 * FFN_DIM, MODEL_DIM))
            self.down_proj = nn.Parameter(torch.empty(NUM_EXPERTS, MODEL_DIM, FFN_DIM))
            if extra:
                self.scale = nn.Parameter(torch.empty(NUM_EXPERTS, MODEL_DIM))
            self.act_fn = nn.SiLU()

        def _forward(
            self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
        ) -> torch.Tensor:
            total = torch.zeros_like(hidden, dtype=accumulator(hidden, weights))
            mask = functional.one_hot(index, num_classes=self.num_experts + 1).permute(2, 1, 0)
            hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
            for expert in hit:
                expert = expert[0]
                if expert == self.num_experts:
                    continue
                position, token = torch.where(mask[expert])
                gate, up = functional.linear(hidden[token], self.gate_up_proj[expert]).chunk(2, -1)
                y = functional.linear(self.act_fn(gate) * up, self.down_proj[expert])
                if extra:
                    y = y * self.scale[expert]
                y = y * weights[token, position, None] * factor
                total.index_add_(0, token, y.to(total.dtype))
            return total.to(hidden.dtype)

    first, second, third = names
    scope: dict[str, Any] = {}
    exec(  # the names of the arguments are the point
        f"def forward(self, {first}, {second}, {third}):\n"
        f"    return self._forward({first}, {second}, {third})",
        scope,
    )
    FakeExperts.forward = scope["forward"]  # type: ignore[method-assign]
    return use_experts_implementation(FakeExperts)


def build(experts_class: type[nn.Module], dtype: torch.dtype) -> nn.Module:
    experts = experts_class(SimpleNamespace(_experts_implementation="eager"))
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, generator=generator)
    return experts.to(dtype).eval()


def in_float32(hidden: torch.Tensor, weights: torch.Tensor) -> torch.dtype:
    return torch.float32


def in_hidden(hidden: torch.Tensor, weights: torch.Tensor) -> torch.dtype:
    return hidden.dtype


def in_router(hidden: torch.Tensor, weights: torch.Tensor) -> torch.dtype:
    return weights.dtype


@pytest.mark.parametrize("on_meta", [True, False])
@pytest.mark.parametrize(
    ("accumulator", "expected"),
    [
        (in_hidden, Accumulator.HIDDEN),
        (in_float32, Accumulator.FLOAT32),
        (in_router, Accumulator.ROUTER),
    ],
)
def test_accumulator_is_found(
    accumulator: Callable[..., torch.dtype], expected: Accumulator, on_meta: bool
) -> None:
    """Law: the dtype in which a class adds up its experts is found by trying, meta or not."""
    with torch.device("meta" if on_meta else "cpu"):
        experts = fake_experts(accumulator)(SimpleNamespace(_experts_implementation="eager"))
    math = prove_math(experts, torch.bfloat16, CPU)
    assert math is not None
    assert math.accumulator is expected
    assert all(p.is_meta == on_meta for p in experts.parameters())
    assert experts.num_experts == NUM_EXPERTS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_own_maths_is_not_replaced(dtype: torch.dtype) -> None:
    """Law: a class with maths of its own (a factor, a parameter more) has no fast loop."""
    assert prove_math(build(fake_experts(in_hidden, factor=1.5), dtype), dtype, CPU) is None
    assert prove_math(build(fake_experts(in_hidden, extra=True), dtype), dtype, CPU) is None


class Block(nn.Module):
    """What stands around experts: knows top-k, calls them by position or by name."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.top_k = TOP_K
        self.experts = experts

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.experts(*args, **kwargs)
        return output


NAMES = [("hidden_states", "top_k_index", "top_k_weights"), ("x", "selected", "scores")]


@pytest.mark.parametrize("names", NAMES, ids=["usual names", "own names"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "kind",
    [
        {"accumulator": in_hidden},
        {"accumulator": in_float32},
        {"accumulator": in_router},
        {"accumulator": in_hidden, "factor": 1.5},
        {"accumulator": in_float32, "extra": True},
    ],
    ids=["hidden", "float32", "router", "factor", "parameter"],
)
@pytest.mark.filterwarnings("ignore:.*expert slots are fewer")
def test_offloaded_equals_the_class_itself(
    kind: dict[str, Any], dtype: torch.dtype, names: tuple[str, str, str]
) -> None:
    """Law: with few slots, by the fast loop or the class's own forward, the bits are the same."""
    block = Block(build(fake_experts(names=names, **kind), dtype))
    generator = torch.Generator().manual_seed(1)
    calls = []
    for num_tokens in (1, 3, 30):
        hidden = torch.randn(num_tokens, MODEL_DIM, generator=generator).to(dtype)
        index = torch.rand(num_tokens, NUM_EXPERTS, generator=generator).argsort(-1)[:, :TOP_K]
        scores = torch.rand(num_tokens, TOP_K, generator=generator)
        calls.append((hidden, index, scores.to(dtype) if num_tokens == 3 else scores))
    with torch.no_grad():
        expected = [block(*call) for call in calls]
        for num_slots in (TOP_K, 3, NUM_EXPERTS):
            share = num_slots / NUM_EXPERTS + 0.01 * (num_slots < 5)
            with moe_runtime.offload(block, share, exact=True):
                for (hidden, index, scores), output in zip(calls, expected, strict=True):
                    assert torch.equal(block(hidden, index, scores), output)
                    assert torch.equal(block(hidden, index, **{names[2]: scores}), output)
                    by_name = dict(zip(names, (hidden, index, scores), strict=True))
                    assert torch.equal(block(**by_name), output)
        assert torch.equal(block(*calls[0]), expected[0])
