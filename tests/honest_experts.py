"""The experts of one layer as transformers' eager loop computes them, over whole weights."""

import random

import torch
from torch.nn import functional

from moe_runtime.layer import Accumulator, ExpertMath

# T tokens, K top-k, E experts, D model dim, F ffn dim, n rows of one expert


def silu_gate(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


def halve(values: torch.Tensor) -> torch.Tensor:
    return values * 0.5


def random_math(rng: random.Random) -> ExpertMath:
    """Any combination of flags."""
    has_gate = rng.random() < 0.7
    return ExpertMath(
        up_name="gate_up_proj" if has_gate else "up_proj",
        has_bias=rng.random() < 0.3,
        is_transposed=rng.random() < 0.3,
        apply_gate=silu_gate if has_gate else functional.relu,
        post_norm=halve if rng.random() < 0.2 else None,
        accumulator=rng.choice(list(Accumulator)),
    )


def parameter_shapes(math: ExpertMath, model_dim: int, ffn_dim: int) -> dict[str, tuple[int, ...]]:
    """One expert's parameters."""
    rows = 2 * ffn_dim if math.up_name == "gate_up_proj" else ffn_dim
    up, down = (rows, model_dim), (model_dim, ffn_dim)
    if math.is_transposed:
        up, down = up[::-1], down[::-1]
    shapes: dict[str, tuple[int, ...]] = {math.up_name: up, "down_proj": down}
    if math.has_bias:
        shapes |= {f"{math.up_name}_bias": (rows,), "down_proj_bias": (model_dim,)}
    return shapes


def honest_forward(
    math: ExpertMath,
    weights: list[dict[str, torch.Tensor]],
    hidden_TD: torch.Tensor,
    index_TK: torch.Tensor,
    scores_TK: torch.Tensor,
) -> torch.Tensor:
    """The eager loop: experts in ascending order, rows by top-k position, then token."""
    dtype = math.accumulator.dtype(hidden_TD.dtype, scores_TK.dtype)
    total_TD = torch.zeros_like(hidden_TD, dtype=dtype)
    mask_EKT = functional.one_hot(index_TK, num_classes=len(weights) + 1).permute(2, 1, 0)
    for expert, weight in enumerate(weights):
        position_n, token_n = torch.where(mask_EKT[expert])
        if not len(token_n):
            continue
        y_nD = math.apply_gate(project(math, hidden_TD[token_n], weight, math.up_name))
        y_nD = project(math, y_nD, weight, "down_proj")
        if math.post_norm is not None:
            y_nD = math.post_norm(y_nD)
        y_nD = y_nD * scores_TK[token_n, position_n, None]
        total_TD.index_add_(0, token_n, y_nD.to(dtype))
    return total_TD.to(hidden_TD.dtype)


def project(
    math: ExpertMath, x: torch.Tensor, weight: dict[str, torch.Tensor], name: str
) -> torch.Tensor:
    y = x @ weight[name] if math.is_transposed else functional.linear(x, weight[name])
    return y + weight[f"{name}_bias"] if math.has_bias else y


def random_routing(
    rng: random.Random, generator: torch.Generator, num_tokens: int, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[T, K]` experts and scores: even, skewed, repeating an expert, or with the sentinel."""
    top_k = rng.randint(1, num_experts)
    kind = rng.choice(["even", "skewed", "one", "repeating", "sentinel"])
    noise_TE = torch.rand(num_tokens, num_experts, generator=generator)
    if kind == "skewed":
        noise_TE = noise_TE ** torch.arange(1, num_experts + 1)
    elif kind == "one":
        noise_TE = noise_TE[:1].expand(num_tokens, -1)
    index_TK = noise_TE.argsort(-1, descending=True)[:, :top_k]
    if kind == "repeating":
        index_TK = torch.randint(num_experts, (num_tokens, top_k), generator=generator)
    elif kind == "sentinel":
        index_TK = torch.randint(num_experts + 1, (num_tokens, top_k), generator=generator)
    return index_TK, torch.rand(num_tokens, top_k, generator=generator)
