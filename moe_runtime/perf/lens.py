"""MoE-Lens' two stages: the most tokens a second when all weights stream by in every pass.

The paper is arXiv 2504.09345; numbers of equations are its own. A pass reads every weight over one
link and sends as many tokens through as the attention cache can hold: throughput is bounded by the
capacity of that cache, by the link and by arithmetic.
"""

from dataclasses import dataclass

from moe_runtime.errors import BudgetError


@dataclass(frozen=True, slots=True, kw_only=True)
class LensModel:
    """One model: weights in all, those one token uses, their bytes, and cached bytes a token."""

    parameters: float
    active_parameters: float
    weight_bytes: float
    kv_bytes_per_token: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LensMachine:
    """What computes, the link that weights come over, and the memory of the attention cache."""

    flops: float
    link_bytes_per_second: float
    kv_budget_bytes: float
    kv_bytes_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LensTask:
    """So many sequences of `prompt_tokens`, each of which gets `new_tokens`."""

    prompt_tokens: int
    new_tokens: int
    num_sequences: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOne:
    """Without an end and without pages; rates count prompt tokens too, but for `new_...`."""

    saturating_tokens: float  # in a pass, from which on arithmetic is the limit
    parallelism_memory_efficiency: float
    pass_seconds: float  # to read all weights over the link once
    kv_tokens: float  # that the cache holds
    memory_tokens_per_second: float
    compute_tokens_per_second: float
    tokens_per_second: float
    new_tokens_per_second: float
    effective_kv_share: float  # by which prefill beside decoding makes the cache look larger


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTwo:
    """With pages, a finite number of sequences and what one pass can take."""

    admitted_per_pass: float
    tokens_per_pass: float
    intensity: float  # operations for each byte over the link
    pass_seconds: float
    attention_seconds: float  # of a pass, where the cache is
    num_passes: float
    tokens_per_second: float
    new_tokens_per_second: float


def intensity(num_tokens: float, *, parameters: float, active_parameters: float) -> float:
    """Operations for each byte of weights when a pass has `num_tokens`: equation 1.

    I = n (6 N_k h h_i + 4 h^2 + 4 h^2/s) / (6 N_e h h_i + 4 h^2 + 4 h^2/s): operations are two a
    weight used, bytes two a weight. Assumes bfloat16 and that a pass reads every weight; the
    simplification n N_k / N_e, where experts are nearly all weights, is not made.
    """
    return num_tokens * active_parameters / parameters


def saturating_tokens(
    *, flops: float, link_bytes_per_second: float, parameters: float, active_parameters: float
) -> float:
    """Tokens in a pass from which on arithmetic takes longer than reading: equation 2.

    n >= (C / B_IO) (N_e / N_k), with all weights in place of experts alone. Assumes that arithmetic
    runs at its peak and that nothing but weights goes over the link.
    """
    return flops / link_bytes_per_second * parameters / active_parameters


def parallelism_memory_efficiency(prompt_tokens: int, new_tokens: int) -> float:
    """Tokens that a pass can take for each cached token: equation 3.

    PME = (p + g) / sum_{j=0..g} (p + j) ~ 2 (p + g) / ((2 p + g) g). Assumes that sequences are
    spread evenly over their g steps, so that the mean context is p + g/2, and unpaged memory.
    """
    p, g = prompt_tokens, new_tokens
    return 2 * (p + g) / ((2 * p + g) * g)


def effective_kv_share(prompt_tokens: int, new_tokens: int) -> float:
    """By which overlapping prefill and decoding makes the cache look larger: equation 7.

    (p + g) / (p + g/2): a cache that all sequences fill at once would have to hold p + g each.
    """
    p, g = prompt_tokens, new_tokens
    return (p + g) / (p + g / 2)


def stage_one(model: LensModel, machine: LensMachine, task: LensTask) -> StageOne:
    """The bound for endless requests: equation 4, T = min(PME M / delta, T_compute).

    Assumes perfect overlap of link and arithmetic, and attention that is never the limit.
    """
    p, g = task.prompt_tokens, task.new_tokens
    efficiency = parallelism_memory_efficiency(p, g)
    delta = model.weight_bytes / machine.link_bytes_per_second
    kv_tokens = machine.kv_budget_bytes / model.kv_bytes_per_token
    by_memory = efficiency * kv_tokens / delta
    by_compute = machine.flops / (2 * model.active_parameters)
    total = min(by_memory, by_compute)
    return StageOne(
        saturating_tokens=saturating_tokens(
            flops=machine.flops,
            link_bytes_per_second=machine.link_bytes_per_second,
            parameters=model.parameters,
            active_parameters=model.active_parameters,
        ),
        parallelism_memory_efficiency=efficiency,
        pass_seconds=delta,
        kv_tokens=kv_tokens,
        memory_tokens_per_second=by_memory,
        compute_tokens_per_second=by_compute,
        tokens_per_second=total,
        new_tokens_per_second=total * g / (p + g),
        effective_kv_share=effective_kv_share(p, g),
    )


def stage_two(
    model: LensModel,
    machine: LensMachine,
    task: LensTask,
    *,
    block_tokens: int,
    most_tokens_per_pass: float,
) -> StageTwo:
    """The same for K sequences and a cache in pages of b tokens; derived, with stage 1 as limit.

    The paper's equations 8 to 13 in a closed form. In the steady state q sequences enter a pass,
    q g decode, and one holds p + g/2 + b/2 tokens on average (half its last page is empty):

        q = M / (g (p + g/2 + b/2)),  n = min(q (p + g), n_real)
        delta' = max(delta, n / T_compute, attention over q g (p + g/2) tokens)
        T = K (p + g) / (delta' (K/q + g)),  which is PME M / delta for K -> infinity, b -> 0

    Assumes that sequences are of equal length, and that a last wave drains for g passes.
    Raises BudgetError where the cache cannot hold one sequence.
    """
    p, g = task.prompt_tokens, task.new_tokens
    bound = stage_one(model, machine, task)
    pages = -(-(p + g) // block_tokens) * block_tokens
    if bound.kv_tokens < pages:
        raise BudgetError(
            f"the attention cache holds {int(bound.kv_tokens)} tokens and one sequence needs "
            f"{pages}; give it {int(pages * model.kv_bytes_per_token)} bytes or more"
        )
    mean = p + g / 2 + block_tokens / 2
    # No more can be decoding than there are.
    admitted = min(bound.kv_tokens / (g * mean), task.num_sequences / g)
    tokens = admitted * (p + g)
    if tokens > most_tokens_per_pass:
        admitted, tokens = most_tokens_per_pass / (p + g), most_tokens_per_pass
    read_tokens = admitted * g * (p + g / 2)
    attention = read_tokens * model.kv_bytes_per_token / machine.kv_bytes_per_second
    seconds = max(bound.pass_seconds, tokens / bound.compute_tokens_per_second, attention)
    passes = task.num_sequences / admitted + g
    total = task.num_sequences * (p + g) / (seconds * passes)
    return StageTwo(
        admitted_per_pass=admitted,
        tokens_per_pass=tokens,
        intensity=intensity(
            tokens, parameters=model.parameters, active_parameters=model.active_parameters
        ),
        pass_seconds=seconds,
        attention_seconds=attention,
        num_passes=passes,
        tokens_per_second=total,
        new_tokens_per_second=total * g / (p + g),
    )
