"""Routers: from a token's logits to its experts and their weights, in one kernel."""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (Triton's language has no types of Python's.)

from typing import Literal, get_args

import torch
import triton
import triton.language as tl

from moe_runtime.kernels.launch import (
    FLOATS,
    UnsupportedKernelError,
    check_device,
    check_dtype,
    check_shape,
    on_device_of,
)

# T tokens, E experts, K experts a token

Scoring = Literal["softmax", "sigmoid", "chosen_softmax"]
GroupScore = Literal["best", "best_two"]

_MAX_EXPERTS = 4096
_MAX_TOP_K = 64
_TILE_ELEMENTS = 4096  # of scores that one program holds


def route(
    logits_TE: torch.Tensor,
    *,
    top_k: int,
    scoring: Scoring,
    bias_E: torch.Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    group_score: GroupScore = "best",
    normalize: bool = False,
    scaling: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights `[T, K]` float32 and experts `[T, K]` int32 of every token, the best expert first.

    - "softmax": probabilities over all experts (Mixtral, Qwen, OLMoE, DeepSeek-V2).
    - "sigmoid": each expert by itself (DeepSeek-V3, arXiv 2412.19437, equation 15).
    - "chosen_softmax": experts by their logits, then softmax over the chosen ones (gpt-oss).

    `bias_E` is added for the choice and not to the weights. With `num_groups` above 1 only experts
    of the `top_groups` best groups can be chosen (DeepSeek-V2, arXiv 2405.04434, section 2.2.2);
    a group is as good as its best expert, or as the sum of its best two (V3). `normalize` makes the
    weights sum to 1; then they are multiplied by `scaling`.

    Of equal scores the lowest expert is chosen first, of equal groups the lowest group; a NaN is
    chosen last. Reads the logits once; nothing waits for the host.

    Example: logits (1, 3, 2), top_k 2, softmax: probabilities (.090, .665, .245), experts (1, 2),
    weights (.665, .245), normalised (.731, .269).
    """
    weights_TK, experts_TK = _route(
        logits_TE,
        bias_E,
        top_k,
        scoring,
        num_groups,
        top_groups,
        group_score,
        normalize,
        scaling,
    )
    return weights_TK, experts_TK


@torch.library.custom_op("moe_runtime::route", mutates_args=())
def _route(
    logits_TE: torch.Tensor,
    bias_E: torch.Tensor | None,
    top_k: int,
    scoring: str,
    num_groups: int,
    top_groups: int,
    group_score: str,
    normalize: bool,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_device(_route_kernel, logits_TE=logits_TE, bias_E=bias_E)
    _check_route(logits_TE, bias_E, top_k, scoring, num_groups, top_groups, group_score, normalize)
    T, E = logits_TE.shape
    weights_TK = logits_TE.new_empty(T, top_k, dtype=torch.float32)
    experts_TK = logits_TE.new_empty(T, top_k, dtype=torch.int32)
    if T == 0:
        return weights_TK, experts_TK
    padded_groups = triton.next_power_of_2(num_groups)
    padded_group = triton.next_power_of_2(E // num_groups)
    block_tokens = max(1, min(16, _TILE_ELEMENTS // (padded_groups * padded_group)))
    with on_device_of(logits_TE):
        _route_kernel[(triton.cdiv(T, block_tokens),)](
            logits_TE,
            logits_TE if bias_E is None else bias_E,
            weights_TK,
            experts_TK,
            T,
            logits_TE.stride(0),
            logits_TE.stride(1),
            0 if bias_E is None else bias_E.stride(0),
            scaling,
            NUM_GROUPS=num_groups,
            PADDED_GROUPS=padded_groups,
            GROUP=E // num_groups,
            PADDED_GROUP=padded_group,
            TOP_GROUPS=top_groups,
            BEST_TWO=group_score == "best_two",
            TOP_K=top_k,
            PADDED_TOP_K=triton.next_power_of_2(top_k),
            SCORING=scoring,
            HAS_BIAS=bias_E is not None,
            NORMALIZE=normalize,
            BLOCK_TOKENS=block_tokens,
            num_warps=4,
        )
    return weights_TK, experts_TK


@_route.register_fake
def _(
    logits_TE: torch.Tensor,
    bias_E: torch.Tensor | None,
    top_k: int,
    scoring: str,
    num_groups: int,
    top_groups: int,
    group_score: str,
    normalize: bool,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (logits_TE.shape[0], top_k)
    return (
        logits_TE.new_empty(shape, dtype=torch.float32),
        logits_TE.new_empty(shape, dtype=torch.int32),
    )


def _check_route(
    logits_TE: torch.Tensor,
    bias_E: torch.Tensor | None,
    top_k: int,
    scoring: str,
    num_groups: int,
    top_groups: int,
    group_score: str,
    normalize: bool,
) -> None:
    check_shape("logits_TE", logits_TE, (None, None))
    check_dtype("logits_TE", logits_TE, FLOATS)
    E = logits_TE.shape[1]
    if bias_E is not None:
        check_shape("bias_E", bias_E, (E,))
        check_dtype("bias_E", bias_E, FLOATS)
    for name, value, supported in (
        ("scoring", scoring, get_args(Scoring)),
        ("group_score", group_score, get_args(GroupScore)),
    ):
        if value not in supported:
            raise UnsupportedKernelError(f"{name} is {value!r}; supported: {', '.join(supported)}")
    if scoring == "chosen_softmax" and normalize:
        raise UnsupportedKernelError(
            "normalize has no effect with scoring 'chosen_softmax', whose weights sum to 1: "
            "leave it out"
        )
    if not 1 <= E <= _MAX_EXPERTS:
        raise UnsupportedKernelError(f"num_experts ({E}) must be 1 to {_MAX_EXPERTS}")
    if num_groups < 1 or E % num_groups:
        raise UnsupportedKernelError(
            f"num_experts ({E}) must be divisible by num_groups ({num_groups})"
        )
    if not 1 <= top_groups <= num_groups:
        raise UnsupportedKernelError(
            f"top_groups ({top_groups}) must be 1 to num_groups ({num_groups})"
        )
    if group_score == "best_two" and E // num_groups < 2:
        raise UnsupportedKernelError("group_score 'best_two' needs groups of two experts or more")
    most = min(_MAX_TOP_K, E // num_groups * top_groups)
    if not 1 <= top_k <= most:
        raise UnsupportedKernelError(
            f"top_k ({top_k}) must be 1 to {most}: at most {_MAX_TOP_K}, and no more than the "
            f"experts of {top_groups} of {num_groups} groups of {E // num_groups}"
        )


@triton.jit
def _route_kernel(
    logits,
    bias,
    weights,
    experts,
    num_tokens,
    stride_token,
    stride_expert,
    stride_bias,
    scaling,
    NUM_GROUPS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    BEST_TWO: tl.constexpr,
    TOP_K: tl.constexpr,
    PADDED_TOP_K: tl.constexpr,
    SCORING: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """One program routes BLOCK_TOKENS tokens; a column is a place (group, member) of an expert."""
    # Below every score, in the order in which they may be chosen; sums of two stay finite.
    LOWEST: tl.constexpr = -1.0e38  # NaN
    EXCLUDED: tl.constexpr = -3.0e38  # of a group that is not chosen
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    column = tl.arange(0, PADDED_GROUPS * PADDED_GROUP)
    expert = (column // PADDED_GROUP) * GROUP + column % PADDED_GROUP
    exists = (column // PADDED_GROUP < NUM_GROUPS) & (column % PADDED_GROUP < GROUP)
    is_token = token < num_tokens

    logit = tl.load(
        logits + token[:, None] * stride_token + expert[None, :] * stride_expert,
        mask=is_token[:, None] & exists[None, :],
        other=0.0,
    ).to(tl.float32)
    logit = tl.where(exists[None, :], logit, float("-inf"))
    if SCORING == "softmax":
        exponential = tl.exp(logit - tl.max(logit, axis=1)[:, None])
        score = exponential / tl.sum(exponential, axis=1)[:, None]
    elif SCORING == "sigmoid":
        score = 1.0 / (1.0 + tl.exp(-logit))
    else:
        score = logit

    choice = score
    if HAS_BIAS:
        choice += tl.load(bias + expert * stride_bias, mask=exists, other=0.0).to(tl.float32)[
            None, :
        ]
    choice = tl.where(choice > LOWEST, choice, LOWEST)  # false for NaN
    choice = tl.where(exists[None, :], choice, float("-inf"))

    if NUM_GROUPS > 1:
        group = tl.arange(0, PADDED_GROUPS)
        member = tl.arange(0, PADDED_GROUP)
        grouped = tl.reshape(choice, (BLOCK_TOKENS, PADDED_GROUPS, PADDED_GROUP))
        worth = tl.max(grouped, axis=2)
        if BEST_TWO:
            best = tl.argmax(grouped, axis=2, tie_break_left=True)
            rest = tl.where(member[None, None, :] == best[:, :, None], float("-inf"), grouped)
            worth += tl.max(rest, axis=2)
        worth = tl.where(group[None, :] < NUM_GROUPS, worth, float("-inf"))
        is_kept = tl.zeros((BLOCK_TOKENS, PADDED_GROUPS), dtype=tl.int32)
        for _ in range(TOP_GROUPS):
            chosen_group = tl.argmax(worth, axis=1, tie_break_left=True)
            is_chosen = group[None, :] == chosen_group[:, None]
            is_kept = tl.where(is_chosen, 1, is_kept)
            worth = tl.where(is_chosen, float("-inf"), worth)
        grouped = tl.where(is_kept[:, :, None] == 1, grouped, EXCLUDED)
        choice = tl.reshape(grouped, (BLOCK_TOKENS, PADDED_GROUPS * PADDED_GROUP))
        choice = tl.where(exists[None, :], choice, float("-inf"))

    rank = tl.arange(0, PADDED_TOP_K)
    weight = tl.zeros((BLOCK_TOKENS, PADDED_TOP_K), dtype=tl.float32)
    chosen = tl.zeros((BLOCK_TOKENS, PADDED_TOP_K), dtype=tl.int32)
    for k in range(TOP_K):
        is_best = column[None, :] == tl.argmax(choice, axis=1, tie_break_left=True)[:, None]
        best_score = tl.sum(tl.where(is_best, score, 0.0), axis=1)
        best_expert = tl.sum(tl.where(is_best, expert[None, :], 0), axis=1)
        weight = tl.where(rank[None, :] == k, best_score[:, None], weight)
        chosen = tl.where(rank[None, :] == k, best_expert[:, None], chosen)
        choice = tl.where(is_best, float("-inf"), choice)

    is_rank = rank[None, :] < TOP_K
    if SCORING == "chosen_softmax":
        weight = tl.where(is_rank, weight, float("-inf"))
        weight = tl.exp(weight - tl.max(weight, axis=1)[:, None])
        weight = weight / tl.sum(weight, axis=1)[:, None]
    elif NORMALIZE:
        # The least number keeps a row of zeros from becoming NaN, as in DeepSeek-V3.
        weight = weight / (tl.sum(weight, axis=1)[:, None] + 1.0e-20)
    place = token[:, None] * TOP_K + rank[None, :]
    is_stored = is_token[:, None] & is_rank
    tl.store(weights + place, weight * scaling, mask=is_stored)
    tl.store(experts + place, chosen, mask=is_stored)
