"""The hit rates that a planner reads off a recorded trace."""

from moe_runtime.perf.hit_curve import HitCurve
from moe_runtime.simulate.accesses import Accesses
from moe_runtime.simulate.replay import replay_all
from moe_runtime.trace import Trace

_EIGHTHS = range(1, 8)


def hit_curve(
    trace: Trace, *, policy: str = "lru", batch: int = 1, is_own: bool = False
) -> HitCurve:
    """Of `policy` over eighths of all experts, with the cache that runs the model.

    The trace's steps are of `batch` tokens; `is_own`: of the very model that is planned.
    """
    accesses = Accesses.of(trace)
    slots = sorted({max(1, accesses.num_keys * eighth // 8) for eighth in _EIGHTHS})
    results = replay_all(accesses, slots=slots, policies=[policy])
    return HitCurve(
        shares=tuple(result.slots / accesses.num_keys for result in results),
        hit_rates=tuple(result.hit_rate for result in results),
        used_share=len(accesses) / trace.num_steps / accesses.num_keys,
        source=f"{policy} over a trace of {trace.num_tokens} tokens of {trace.model}",
        batch=batch,
        is_own=is_own,
    )
