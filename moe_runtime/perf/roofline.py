"""MoE-Lightning's hierarchical roofline, and the policy that a linear programme finds under it.

The paper is arXiv 2411.11217 (ASPLOS'25). Weights lie in CPU memory and partly on the GPU, the
attention of decoding runs on the CPU beside its cache, everything else on the GPU.
"""

from dataclasses import dataclass
from typing import Any

from moe_runtime.errors import BudgetError, MissingPackageError

_GPU_SHARE, _CPU_SHARE = 0.86, 0.8  # of memory that may be planned with, as the authors' code has
_SLACK = 1.2  # of intermediate tensors
_VALUE_BYTES = 2
_SMALL_BATCHES = (1, 2, 3, 4)
_BATCH_STEP = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class RooflineModel:
    """Shapes of a model with `num_experts` experts in every layer; values take two bytes."""

    num_layers: int
    hidden_size: int
    expert_size: int
    num_heads: int
    num_key_heads: int
    num_experts: int
    top_k: int

    @property
    def key_size(self) -> float:
        """Values of the keys of one token in one layer."""
        return self.hidden_size * self.num_key_heads / self.num_heads

    @property
    def layer_bytes(self) -> float:
        """Of the experts of one layer."""
        return _VALUE_BYTES * 3.0 * self.hidden_size * self.expert_size * self.num_experts

    @property
    def other_bytes(self) -> float:
        """Of all attention weights."""
        return (4 * self.hidden_size**2 + 4 * self.hidden_size * self.key_size) * self.num_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class RooflineMachine:
    """A GPU, a CPU and the link from CPU memory to the GPU; rates in bytes and operations."""

    gpu_memory_bytes: float
    cpu_memory_bytes: float
    link_bytes_per_second: float
    gpu_bytes_per_second: float
    cpu_bytes_per_second: float
    gpu_flops: float
    cpu_flops: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RooflinePolicy:
    """`num_micro_batches` of `micro_batch` sequences; `gpu_share` of the experts' weights on it."""

    micro_batch: int
    num_micro_batches: int
    gpu_share: float
    link_seconds: float  # a layer
    gpu_seconds: float
    cpu_seconds: float
    layer_seconds: float
    tokens_per_second: float

    @property
    def batch(self) -> int:
        """Sequences that pass a layer before the next one starts."""
        return self.micro_batch * self.num_micro_batches


def attainable_flops(
    machine: RooflineMachine, *, link_intensity: float, gpu_intensity: float
) -> float:
    """Operations a second on the GPU: section 3.2, min(F, B_gpu I_gpu, B_link I_link).

    Intensities are operations for each byte that the level moves. Assumes that moving and computing
    overlap without loss.
    """
    return min(
        machine.gpu_flops,
        machine.gpu_bytes_per_second * gpu_intensity,
        machine.link_bytes_per_second * link_intensity,
    )


def turning_points(
    machine: RooflineMachine, *, cpu_intensity: float, gpu_intensity: float
) -> tuple[float, float]:
    """Intensities over the link at which the place to compute, and then the limit, change.

    P1: below it the CPU, which has the weights beside it, is faster than fetching them. P2: above
    it the GPU's own memory or arithmetic is the limit, and a faster link gains nothing. Section
    3.2. Assumes that CPU and GPU compute the same operation.
    """
    cpu = min(machine.cpu_flops, machine.cpu_bytes_per_second * cpu_intensity)
    gpu = min(machine.gpu_flops, machine.gpu_bytes_per_second * gpu_intensity)
    return cpu / machine.link_bytes_per_second, gpu / machine.link_bytes_per_second


def find_policy(
    model: RooflineModel, machine: RooflineMachine, *, prompt_tokens: int, new_tokens: int
) -> RooflinePolicy:
    """The policy with the most new tokens a second. Raises BudgetError where none fits.

    Tries micro-batches of 1, 2, 3, 4, 36, 68, ... sequences, each with as many of them as fit:
    throughput never falls with their number, as each layer's time is a maximum of affine
    functions of it that do not start below 0.
    """
    best: RooflinePolicy | None = None
    micro_batch = 1
    while True:
        found = _most_batches(model, machine, micro_batch, prompt_tokens, new_tokens)
        if found is None:
            break
        if best is None or found.tokens_per_second > best.tokens_per_second:
            best = found
        is_small = micro_batch < _SMALL_BATCHES[-1]
        micro_batch += 1 if is_small else _BATCH_STEP
    if best is None:
        raise BudgetError(
            f"{machine.gpu_memory_bytes:.0f} bytes of GPU memory and "
            f"{machine.cpu_memory_bytes:.0f} of CPU memory do not hold "
            "the weights and one sequence; give the CPU "
            f"{(model.layer_bytes * model.num_layers) / _CPU_SHARE:.0f} bytes or more"
        )
    return best


def _most_batches(
    model: RooflineModel, machine: RooflineMachine, micro_batch: int, prompt: int, new: int
) -> RooflinePolicy | None:
    """With as many micro-batches as fit, found by doubling and halving; None where not one does."""

    def solved(number: int) -> RooflinePolicy | None:
        return solve_policy(
            model, machine, micro_batch, number, prompt_tokens=prompt, new_tokens=new
        )

    found = solved(1)
    if found is None:
        return None
    step = 1
    while (more := solved(found.num_micro_batches + step)) is not None:
        found, step = more, 2 * step
    while step := step // 2:
        more = solved(found.num_micro_batches + step)
        found = found if more is None else more
    return found


def solve_policy(
    model: RooflineModel,
    machine: RooflineMachine,
    micro_batch: int,
    num_micro_batches: int,
    *,
    prompt_tokens: int,
    new_tokens: int,
) -> RooflinePolicy | None:
    """The best split of weights for one batch; None where memory does not suffice.

    Data         s prompt, n new tokens, l layers, h1 hidden, h2 expert size, e experts, k a token,
                 u micro-batch, b = u times their number, w = bytes of a layer's experts
    Variables    g in [0, 1]: share of w on the GPU; T: seconds a layer
    Objective    minimise T
    Constraints  T >= w (1 - g) / B_link
                 T >= (b/u) max(6 u h1 h2 k / F_gpu, (2 u h1 + 2 u h2 + 6 h1 h2 e) / B_gpu)
                 T >= (b/u) max(attention operations / F_cpu, attention bytes / B_cpu)
                 GPU: other + w l g + 4 b h1 + 2 w (1 - g) + intermediate <= 0.86 of its memory,
                      in decoding and in prefill, where states of all prompts are on it
                 CPU: w l (1 - g) + cache + states + 2 w (1 - g) <= 0.8 of its memory

    Assumes prompts of equal length and uniform routing to all experts, counts the operations of
    attention for scores alone as the authors do, and leaves out norms, router and head.
    """
    pulp = _import_pulp()
    s, n, l = prompt_tokens, new_tokens, model.num_layers  # noqa: E741 -- the paper's letters
    h1, h2, u = model.hidden_size, model.expert_size, micro_batch
    b, w = micro_batch * num_micro_batches, model.layer_bytes
    gpu = num_micro_batches * max(
        6 * u * h1 * h2 * model.top_k / machine.gpu_flops,
        (2 * u * h1 + 2 * u * h2 + 6 * h1 * h2 * model.num_experts) / machine.gpu_bytes_per_second,
    )
    cpu = num_micro_batches * _attention_seconds(model, machine, u, s + n)
    programme = pulp.LpProblem("policy", pulp.LpMinimize)
    share = programme.add_variable("gpu_share", 0, 1)
    seconds = programme.add_variable("layer_seconds", max(gpu, cpu))
    programme += seconds
    programme += seconds >= w / machine.link_bytes_per_second * (1 - share)
    gpu_limit = _GPU_SHARE * machine.gpu_memory_bytes
    placed = model.other_bytes + w * l * share + 2 * w * (1 - share)

    def between(tokens: int) -> float:
        """Of a micro-batch with so many tokens, between two products."""
        return 2 * _SLACK * (u * model.top_k * h1 * tokens + u * model.top_k * 3 * h2 * tokens)

    programme += placed + 4 * b * h1 + between(1) <= gpu_limit
    states = 4 * u * s * h1 + 2 * b * s * h1 + 8 * s * model.key_size * u
    programme += placed + states + between(s) <= gpu_limit
    cache = 4 * (s + n) * model.key_size * b * l
    programme += (
        w * l * (1 - share) + cache + 2 * h1 * b * s + 2 * w * (1 - share)
        <= _CPU_SHARE * machine.cpu_memory_bytes
    )
    programme.solve(_engine(pulp))
    if programme.status != pulp.LpStatusOptimal:
        return None
    layer_seconds = float(seconds.value())
    on_gpu = float(share.value())
    return RooflinePolicy(
        micro_batch=u,
        num_micro_batches=num_micro_batches,
        gpu_share=on_gpu,
        link_seconds=w * (1 - on_gpu) / machine.link_bytes_per_second,
        gpu_seconds=gpu,
        cpu_seconds=cpu,
        layer_seconds=layer_seconds,
        tokens_per_second=b * n / (layer_seconds * max(n - 1, 1) * l),
    )


def _attention_seconds(
    model: RooflineModel, machine: RooflineMachine, micro_batch: int, context_tokens: int
) -> float:
    """Of one new token of each sequence on the CPU."""
    width = model.hidden_size / model.num_heads
    flops = 2.0 * micro_batch * context_tokens * model.num_heads * (width + 1)
    values = 2 * model.num_heads * width + 2 * context_tokens * model.num_key_heads * width
    num_bytes = _VALUE_BYTES * micro_batch * values
    return max(flops / machine.cpu_flops, num_bytes / machine.cpu_bytes_per_second)


def _engine(pulp: Any) -> Any:
    available = pulp.listSolvers(onlyAvailable=True)
    name = "HiGHS" if "HiGHS" in available else "PULP_CBC_CMD"
    return pulp.getSolver(name, msg=False)


def _import_pulp() -> Any:
    try:
        import pulp
    except ImportError as error:
        raise MissingPackageError(
            "a policy is found with pulp, which is not installed: pip install pulp highspy"
        ) from error
    return pulp
