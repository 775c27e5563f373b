"""What predictors want to know of a checkpoint: its embedding, its gates, and its digest.

E experts a layer, D model dim.
"""

import hashlib
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from moe_runtime.errors import UnsupportedModelError
from moe_runtime.integrations.transformers.handle import handle
from moe_runtime.integrations.transformers.load import load
from moe_runtime.integrations.transformers.progress import quiet_transformers
from moe_runtime.integrations.transformers.resolve import resolve_model
from moe_runtime.measure.routing_sites import fused_sites, router_beside
from moe_runtime.predictors.gate import gate_topk
from moe_runtime.predictors.predictor import Fingerprint, Gate, ModelFacts
from moe_runtime.trace import Phase, Trace
from moe_runtime.trace_fields import Array

_SAMPLES = 64
_SAMPLE_BYTES = 4096
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
            trust_remote_code=trust_remote_code,
            dtype="auto",
        )
    with closing(handle(loaded)):
        embedding = _numbers(next(loaded.get_input_embeddings().parameters()))
        routers = [router_beside(loaded, site) for site in fused_sites(loaded)]
        gates = tuple(_gate(router, trace.num_experts) for router in routers)
    facts = ModelFacts(
        fingerprint=Fingerprint.of(trace, checkpoint_digest(resolved.folder)),
        embedding=embedding,
        gates=gates if trace.hidden is not None else (),
    )
    if trace.hidden is not None:
        _try_gates(gates, trace)
    return facts


def checkpoint_digest(folder: Path) -> str:
    """16 hexadecimal digits: of the sizes of a checkpoint's weight files and samples of them.

    Reads a little of each file, however large: its head, where the tensors' names and shapes are,
    and blocks at even distances.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for sample in range(_SAMPLES):
                file.seek(size * sample // _SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


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


def _gate(router: nn.Module, num_experts: int) -> Gate:
    """The numbers of a router module of transformers: a matrix, and what may come with it."""
    weight = next((p for p in router.parameters() if p.ndim == 2 and len(p) == num_experts), None)
    if weight is None:
        raise UnsupportedModelError(
            f"router {type(router).__name__} has no matrix of {num_experts} rows; predictors that "
            "need gates cannot be used with this model"
        )
    named: dict[str, Any] = {**dict(router.named_parameters()), **dict(router.named_buffers())}
    zeros = np.zeros(num_experts, np.float32)
    bias, selection = named.get("bias"), named.get("e_score_correction_bias")
    return Gate(
        weight=_numbers(weight),
        bias=zeros if bias is None else _numbers(bias),
        selection_bias=zeros if selection is None else _numbers(selection),
        # transformers scores by sigmoid wherever it corrects the choice by such a bias.
        is_sigmoid=selection is not None,
        num_groups=int(getattr(router, "num_group", None) or getattr(router, "n_group", None) or 1),
        groups_used=int(getattr(router, "topk_group", None) or 1),
    )


def _numbers(tensor: torch.Tensor) -> Array:
    found: Array = tensor.detach().float().cpu().numpy()
    return found
