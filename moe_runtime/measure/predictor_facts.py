"""What predictors want to know of a checkpoint: its embedding, its gates, and its digest.

E experts a layer, D model dim.
"""

from contextlib import closing

import numpy as np

from moe_runtime.errors import UnsupportedModelError
from moe_runtime.integrations.transformers.handle import handle
from moe_runtime.integrations.transformers.load import load
from moe_runtime.integrations.transformers.progress import quiet_transformers
from moe_runtime.integrations.transformers.resolve import resolve_model
from moe_runtime.integrations.transformers.routers import (
    gate_of,
    parameter_numbers,
    router_beside,
)
from moe_runtime.measure.routing_sites import fused_sites
from moe_runtime.memory.checkpoint_digest import checkpoint_digest
from moe_runtime.predictors.gate import gate_topk
from moe_runtime.predictors.predictor import Fingerprint, Gate, ModelFacts
from moe_runtime.trace import Phase, Trace
from moe_runtime.trace_fields import Array

_TRIAL_ROWS = 512
# Recorded inputs are float16 and the model may compute in bfloat16: near ties fall either way.
_LEAST_AGREEMENT = 0.97


def model_facts(
    model: str,
    trace: Trace,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> ModelFacts:
    """Facts of the checkpoint that `trace` was recorded from.

    Where the trace holds what the routers saw, the gates are tried on it, and are left out with a
    UnsupportedModelError when they do not choose what was recorded.
    """
    resolved = resolve_model(model, revision=revision, trust_remote_code=trust_remote_code)
    with quiet_transformers(lambda done, total: None):
        loaded = load(
            resolved.folder,
            expert_memory="auto",
            warm_start=False,
            trust_remote_code=trust_remote_code,
            dtype="auto",
        )
    with closing(handle(loaded)):
        embedding = parameter_numbers(next(loaded.get_input_embeddings().parameters()))
        routers = [router_beside(loaded, site) for site in fused_sites(loaded)]
        gates = tuple(gate_of(router, trace.num_experts) for router in routers)
    facts = ModelFacts(
        fingerprint=Fingerprint.of(trace, checkpoint_digest(resolved.folder)),
        embedding=embedding,
        gates=gates if trace.hidden is not None else (),
    )
    if trace.hidden is not None:
        _try_gates(gates, trace)
    return facts


def agreement(gate: Gate, hidden: Array, topk: Array) -> float:
    """The share of recorded choices `[T, K]` that the gate makes from what its router saw."""
    chosen = gate_topk(gate, hidden, topk.shape[1])
    return float((chosen[:, :, None] == topk[:, None]).any(1)[topk >= 0].mean())


def _try_gates(gates: tuple[Gate, ...], trace: Trace) -> None:
    assert trace.hidden is not None
    rows = np.flatnonzero(trace.phase != Phase.PADDING)[:_TRIAL_ROWS]
    for layer, gate in enumerate(gates):
        found = agreement(gate, trace.hidden[rows, layer], trace.topk[rows, layer])
        if found < _LEAST_AGREEMENT:
            raise UnsupportedModelError(
                f"the gate of layer {layer}, as it is understood here, makes {found:.1%} of the "
                f"recorded choices, and {_LEAST_AGREEMENT:.0%} are asked for; the trace is of "
                "another checkpoint, or this family's gate is of another kind: leave out "
                "gate_lookahead and gate_corrected"
            )
