"""Who chooses the experts of a benchmark: the model's own router, or a replayed trace."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_runtime.errors import TraceError
from moe_runtime.trace import Phase, Trace

FORCED, UNIFORM, _TRACE = "forced", "uniform", "trace:"
# The draw is the same for all contestants, and for all runs.
_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """`forced` is random tokens through the model's own router; `trace` is None then and, until
    the model's shape is known, for `uniform`."""

    name: str
    trace: Trace | None = None

    @property
    def is_replayed(self) -> bool:
        return self.name != FORCED

    def rows(self, *, num_rows: int, num_layers: int, num_experts: int, top_k: int) -> Trace | None:
        """The rows to replay, padding left out and no more than `num_rows`; None when forced.

        Uniform: each token uses `top_k` experts of each layer, drawn without replacement.
        """
        if not self.is_replayed:
            return None
        if self.trace is not None:
            kept = np.flatnonzero(self.trace.phase != Phase.PADDING)[:num_rows]
            return self.trace.select(kept)
        noise = np.random.default_rng(_SEED).random((num_rows, num_layers, num_experts))
        return Trace.of({"topk": noise.argsort(axis=2)[:, :, :top_k].astype(np.int16)},
                        source="uniform draws", num_experts=num_experts)  # fmt: skip


def read_routings(text: str) -> list[Routing]:
    """`forced`, `uniform` or `trace:FILE`, several by commas. Raises ValueError or TraceError."""
    found = []
    for name in (part.strip() for part in text.split(",")):
        if name in (FORCED, UNIFORM):
            found.append(Routing(name=name))
        elif name.startswith(_TRACE):
            path = Path(name.removeprefix(_TRACE))
            trace = Trace.load(path, leave_out=("hidden", "gate_probs"))
            if not (trace.phase != Phase.PADDING).any():
                raise TraceError(f"trace {path} holds nothing but padding; record it again")
            found.append(Routing(name=f"{_TRACE}{path.name}", trace=trace))
        else:
            raise ValueError(
                f"routing {name!r} is unknown; write {FORCED}, {UNIFORM} or {_TRACE}FILE.npz"
            )
    if len({routing.name for routing in found}) < len(found):
        raise ValueError(f"--routing {text} names the same routing twice; leave one out")
    return found
