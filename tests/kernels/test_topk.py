"""The routing kernel chooses and weighs as its reference and as the routers of transformers do."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from moe_runtime.kernels.launch import UnsupportedKernelError
from moe_runtime.kernels.reference import route_reference
from moe_runtime.kernels.topk import route

pytestmark = pytest.mark.usefixtures("poison")
# float32 exponentials and divisions of two libraries: a few units in the last place.
TOLERANCE = 2e-6

VARIANTS: list[dict[str, Any]] = [
    {"scoring": "softmax", "top_k": 2, "normalize": True},
    {"scoring": "softmax", "top_k": 3},
    {"scoring": "sigmoid", "top_k": 4, "normalize": True, "scaling": 2.5},
    {"scoring": "chosen_softmax", "top_k": 4},
    {"scoring": "softmax", "top_k": 1},
    {"scoring": "softmax", "top_k": 3, "num_groups": 3, "top_groups": 2, "scaling": 16.0},
    {
        "scoring": "sigmoid",
        "top_k": 4,
        "num_groups": 6,
        "top_groups": 3,
        "group_score": "best_two",
        "normalize": True,
    },
]


def agrees(logits_TE: torch.Tensor, device: torch.device, **variant: Any) -> None:
    bias_E = variant.pop("bias_E", None)
    expected_weights, expected = route_reference(logits_TE, bias_E=bias_E, **variant)
    moved_E = None if bias_E is None else bias_E.to(device)
    weights_TK, experts_TK = route(logits_TE.to(device), bias_E=moved_E, **variant)
    assert weights_TK.dtype == torch.float32
    assert experts_TK.dtype == torch.int32
    assert torch.equal(experts_TK.cpu(), expected)
    torch.testing.assert_close(weights_TK.cpu(), expected_weights, rtol=TOLERANCE, atol=1e-9)


def distinct(T: int, E: int, seed: int) -> torch.Tensor:
    """Logits that differ so much that rounding cannot exchange two scores."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(E, generator=generator) for _ in range(T)]
    return (torch.stack(rows) if T else torch.zeros(0, E)).float() * (6.0 / E) - 3.0


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("T", [0, 1, 17, 37])
def test_the_kernel_equals_its_reference(
    T: int, has_bias: bool, variant: dict[str, Any], device: torch.device
) -> None:
    E = 12
    # A bias that reorders: steps of logits and bias are incommensurable.
    bias_E = torch.randperm(E, generator=torch.Generator().manual_seed(1)) * 0.0371
    agrees(distinct(T, E, seed=T), device, bias_E=bias_E if has_bias else None, **variant)


@settings(max_examples=25)
@given(data=st.data())
def test_any_number_of_experts_and_groups(data: st.DataObject) -> None:
    num_groups = data.draw(st.integers(1, 7))
    group = data.draw(st.integers(2, 9))
    top_groups = data.draw(st.integers(1, num_groups))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    agrees(
        distinct(data.draw(st.integers(1, 5)), num_groups * group, seed=num_groups),
        device,
        top_k=data.draw(st.integers(1, group * top_groups)),
        num_groups=num_groups,
        top_groups=top_groups,
        group_score=data.draw(st.sampled_from(["best", "best_two"])),
        scoring=data.draw(st.sampled_from(["softmax", "sigmoid"])),
        normalize=data.draw(st.booleans()),
    )


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "chosen_softmax"])
def test_of_equal_scores_the_lowest_expert_is_chosen_first(
    scoring: Any, device: torch.device
) -> None:
    logits_TE = torch.tensor([[0.0] * 7, [0, 1, 0, 1, 1, 0, 1]], device=device)
    _, experts_TK = route(logits_TE, top_k=5, scoring=scoring)
    assert experts_TK.tolist() == [[0, 1, 2, 3, 4], [1, 3, 4, 6, 0]]


def test_of_equal_groups_the_lowest_is_chosen_first(device: torch.device) -> None:
    logits_TE = torch.zeros(1, 12, device=device)
    _, experts_TK = route(logits_TE, top_k=5, scoring="softmax", num_groups=4, top_groups=2)
    assert experts_TK.tolist() == [[0, 1, 2, 3, 4]]


def test_a_nan_is_chosen_last_and_experts_always_exist(device: torch.device) -> None:
    """An index outside the experts would read foreign memory in the kernels that follow."""
    nan, inf = float("nan"), float("inf")
    logits_TE = torch.tensor([[nan, 0.5, -inf, 0.1, nan], [nan] * 5, [-inf] * 5], device=device)
    weights_TK, experts_TK = route(logits_TE, top_k=5, scoring="sigmoid")
    assert experts_TK.sort(dim=1).values.tolist() == [[0, 1, 2, 3, 4]] * 3
    assert experts_TK[0, :2].tolist() == [1, 3]
    assert weights_TK[0, :2].isfinite().all()
    assert weights_TK[1].isnan().all()
    for scoring in ("softmax", "chosen_softmax"):
        _, experts_TK = route(logits_TE, top_k=3, scoring=scoring)
        assert ((experts_TK >= 0) & (experts_TK < 5)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_may_be_short_and_strided(dtype: torch.dtype, device: torch.device) -> None:
    logits_TE = distinct(9, 16, seed=3).t().contiguous().t().to(dtype)
    assert not logits_TE.is_contiguous()
    agrees(logits_TE, device, top_k=4, scoring="softmax")


@pytest.mark.parametrize(
    ("family", "changes", "variant"),
    [
        ("mixtral", {"num_local_experts": 8}, {"scoring": "softmax", "normalize": True}),
        (
            "qwen3_moe",
            {"num_experts": 12, "norm_topk_prob": True},
            {"scoring": "softmax", "normalize": True},
        ),
        ("olmoe", {"num_experts": 12, "norm_topk_prob": False}, {"scoring": "softmax"}),
        (
            "deepseek_v2",
            {"n_routed_experts": 12, "topk_method": "greedy", "routed_scaling_factor": 1.5},
            {"scoring": "softmax", "scaling": 1.5},
        ),
        (
            "deepseek_v2",
            {
                "n_routed_experts": 12,
                "topk_method": "group_limited_greedy",
                "n_group": 4,
                "topk_group": 2,
                "routed_scaling_factor": 16.0,
            },
            {"scoring": "softmax", "num_groups": 4, "top_groups": 2, "scaling": 16.0},
        ),
        (
            "deepseek_v3",
            {
                "n_routed_experts": 24,
                "n_group": 4,
                "topk_group": 2,
                "norm_topk_prob": True,
                "routed_scaling_factor": 2.5,
            },
            {
                "scoring": "sigmoid",
                "num_groups": 4,
                "top_groups": 2,
                "group_score": "best_two",
                "normalize": True,
                "scaling": 2.5,
            },
        ),
        ("gpt_oss", {"num_local_experts": 8}, {"scoring": "chosen_softmax"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_routers_of_transformers_are_met(
    family: str, changes: dict[str, Any], variant: dict[str, Any], device: torch.device
) -> None:
    config = AutoConfig.for_model(family, hidden_size=32, num_experts_per_tok=3, **changes)
    router = router_of(family)(config).requires_grad_(False)
    generator = torch.Generator().manual_seed(5)
    bias_E = None
    for name, tensor in [*router.named_parameters(), *router.named_buffers()]:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
        if name == "e_score_correction_bias":
            bias_E = tensor.to(device)
    logits_TE, expected_TK, chosen_TK = router(torch.randn(50, 32, generator=generator))
    weights_TK, experts_TK = route(logits_TE.to(device), top_k=3, bias_E=bias_E, **variant)
    order_TK = chosen_TK.argsort(dim=1)  # routers may leave their choice unsorted
    own_TK = experts_TK.cpu().argsort(dim=1)
    assert torch.equal(experts_TK.cpu().gather(1, own_TK).long(), chosen_TK.gather(1, order_TK))
    torch.testing.assert_close(
        weights_TK.cpu().gather(1, own_TK),
        expected_TK.gather(1, order_TK),
        rtol=TOLERANCE * 10,  # divided by sums that were added in another order
        atol=1e-9,
    )


def router_of(family: str) -> Any:
    from importlib import import_module

    module = import_module(f"transformers.models.{family}.modeling_{family}")
    (name,) = [
        name
        for name, kind in vars(module).items()
        if name.lower().endswith("topkrouter") and kind.__module__ == module.__name__
    ]
    return getattr(module, name)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"top_k": 0}, r"top_k \(0\) must be 1 to 12"),
        ({"top_k": 13}, r"top_k \(13\) must be 1 to 12"),
        ({"top_k": 7, "num_groups": 4, "top_groups": 2}, r"must be 1 to 6"),
        ({"num_groups": 5}, r"num_experts \(12\) must be divisible by num_groups \(5\)"),
        ({"num_groups": 4, "top_groups": 5}, r"top_groups \(5\) must be 1 to num_groups \(4\)"),
        ({"num_groups": 12, "top_groups": 12, "group_score": "best_two"}, "two experts or more"),
        ({"scoring": "tanh"}, "scoring is 'tanh'; supported: softmax, sigmoid, chosen_softmax"),
        ({"group_score": "mean"}, "supported: best, best_two"),
        ({"scoring": "chosen_softmax", "normalize": True}, "leave it out"),
        ({"bias_E": torch.zeros(11)}, r"bias_E has shape \(11,\); expected: \(12\)"),
        ({"logits_TE": torch.zeros(2, 12, dtype=torch.int64)}, "logits_TE is torch.int64"),
        ({"logits_TE": torch.zeros(12)}, "logits_TE has shape"),
    ],
    ids=str,
)
def test_what_it_cannot_do_is_refused(
    change: dict[str, Any], complaint: str, device: torch.device
) -> None:
    call: dict[str, Any] = {
        "logits_TE": torch.zeros(2, 12),
        "top_k": 2,
        "scoring": "softmax",
        **change,
    }
    moved = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in call.items()
    }
    with pytest.raises(UnsupportedKernelError, match=complaint):
        route(moved.pop("logits_TE"), **moved)


@pytest.mark.parametrize("bias", [False, True])
def test_the_operator_is_sound(bias: bool, device: torch.device) -> None:
    bias_E = torch.zeros(8, device=device) if bias else None
    torch.library.opcheck(
        torch.ops.moe_runtime.route.default,
        (torch.randn(5, 8, device=device), bias_E, 2, "sigmoid", 2, 1, "best_two", True, 1.5),
    )
