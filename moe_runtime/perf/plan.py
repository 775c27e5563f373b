"""What is asked of the planner, and what it answers."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from moe_runtime.model_spec import ModelSpec
from moe_runtime.perf.hardware import Hardware
from moe_runtime.perf.hit_curve import HitCurve
from moe_runtime.perf.latency import Setup, Step

Goal = Literal["latency", "throughput"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """One model, one machine, one workload. None leaves a choice to the planner.

    `memory_bytes` and `host_memory_bytes` are what may be used where experts are computed and, with
    a GPU, on the host behind it, if less than the machine has; `expert_memory_bytes` bounds the
    experts' part. `curves` are hit rates by policy, lru's among them; without any, priors stand in.
    `fixed` are settings that are not to be chosen, by their names in `load()`.
    """

    spec: ModelSpec
    hardware: Hardware
    goal: Goal = "latency"
    prompt_tokens: int = 512
    new_tokens: int = 128
    batch: int | None = None
    num_sequences: int = 1000
    memory_bytes: int | None = None
    host_memory_bytes: int | None = None
    expert_memory_bytes: int | None = None
    allows_lossy: bool = False
    is_exact: bool = False
    curves: Mapping[str, HitCurve] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "new_tokens", "num_sequences"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        if self.batch is not None and self.batch < 1:
            raise ValueError(f"batch ({self.batch}) must be at least 1, or auto")
        total = self.prompt_tokens + self.new_tokens
        if total > self.spec.context_tokens:
            raise ValueError(
                f"{self.prompt_tokens} prompt and {self.new_tokens} new tokens exceed the context "
                f"of {self.spec.context_tokens} tokens of {self.spec.name}; ask for fewer"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the planner chose. Names that `load()` has mean what they mean there.

    `wave_experts`: of one layer, that a forward holds at once. `micro_batch`: sequences of a
    prefill that go through the model together. `prefetch_layers`: read ahead of need.
    """

    batch: int
    micro_batch: int
    num_slots: int
    expert_memory: int
    host_memory: int
    expert_slots: str
    expert_dtype: str
    policy: str
    predictor: str
    prefetch_layers: int
    miss: str
    linears: bool
    page_cache: bool
    threads: int
    wave_experts: int
    kv_place: str
    kv_bytes: int

    def load_arguments(self, *, has_gpu: bool) -> dict[str, Any]:
        """For `load()`: those that depart from its defaults, and the memory."""
        found: dict[str, Any] = {"expert_memory": self.expert_memory}
        if has_gpu:
            found |= {"host_memory": max(self.host_memory, 1), "miss": self.miss}
        chosen = {
            "expert_slots": (self.expert_slots, "auto"),
            "expert_dtype": (self.expert_dtype, "auto"),
            "policy": (self.policy, "lru"),
            "predictor": (self.predictor, "off"),
            "linears": (self.linears, False),
            "page_cache": (self.page_cache, False),
        }
        return found | {k: value for k, (value, default) in chosen.items() if value != default}


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """Bytes where experts are computed; `host_expert_bytes` behind a GPU. They sum to `limit`."""

    limit_bytes: int
    dense_bytes: int
    expert_bytes: int
    kv_bytes: int
    workspace_bytes: int
    reserve_bytes: int
    free_bytes: int
    host_expert_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way to run, and what the model expects of it."""

    settings: Settings
    memory: MemoryUse
    setup: Setup
    step: Step
    prefill_seconds: float
    tokens_per_second: float  # by the goal: of decoding, or of all new tokens, prefill included


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """A change of machine or model, and how many times as fast the best plan is then."""

    change: str
    factor: float
    tokens_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The best candidate, the others by rank, and why."""

    goal: Goal
    chosen: Candidate
    others: tuple[Candidate, ...]
    bottleneck: str
    what_would_help: tuple[Remedy, ...]
    lens: Mapping[str, Any]
    assumptions: tuple[str, ...]

    @property
    def runner_up(self) -> Candidate | None:
        """The best of the others."""
        return self.others[0] if self.others else None

    def as_dict(self) -> dict[str, Any]:
        """What `plan --json` prints."""
        return {
            "goal": self.goal,
            "bottleneck": self.bottleneck,
            "tokens_per_second": self.chosen.tokens_per_second,
            "settings": asdict(self.chosen.settings),
            "memory": asdict(self.chosen.memory),
            "step": _step_as_dict(self.chosen),
            "runner_up": None
            if self.runner_up is None
            else {
                "tokens_per_second": self.runner_up.tokens_per_second,
                "settings": asdict(self.runner_up.settings),
            },
            "what_would_help": [asdict(remedy) for remedy in self.what_would_help],
            "lens": dict(self.lens),
            "assumptions": list(self.assumptions),
        }


def _step_as_dict(candidate: Candidate) -> dict[str, Any]:
    step = asdict(candidate.step)
    lanes = step.pop("lanes")
    return {
        **step,
        "lane_seconds": {lane.value: seconds for lane, seconds in lanes.items()},
        "prefill_seconds": candidate.prefill_seconds,
    }
