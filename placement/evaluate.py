"""Scores a placement on traces: hops, fan-out and load, by layer and by domain.

N tokens, L MoE layers, K experts a token, E experts a layer, G GPUs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from moe_runtime.placement.topology import Topology
from moe_runtime.placement_map import Placement
from moe_runtime.trace import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerEvaluation:
    """One layer; `crossing_fraction` is of the transitions into it, 0 for the first."""

    layer: int  # row of the placement
    layer_id: int
    crossing_fraction: float
    inter_node_fraction: float
    fanout: float
    load_max_over_mean: float
    load_max_over_mean_256: float
    local_activation_rate: float
    gpu_load: tuple[float, ...]  # [G] top-k assignments


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Figures of a placement on some tokens; crossings are those of the first expert's path."""

    num_tokens: int
    crossings_per_token: float
    crossing_fraction: float
    inter_node_fraction: float
    cost_per_transition: float  # by the topology's costs
    fanout: float  # distinct GPUs a token and layer
    load_max_over_mean: float
    load_max_over_mean_256: float
    imbalance_ratio: float
    local_activation_rate: float
    per_layer: tuple[LayerEvaluation, ...]
    per_domain: Mapping[str, "Evaluation"] = field(default_factory=dict)


def evaluate(
    placement: Placement, traces: Sequence[Trace], topology: Topology | None = None
) -> Evaluation:
    """Follow every token of `traces` through the placement (flat topology if None).

    A token waits where its first expert of the layer before computed it (before the first layer:
    nowhere). Each of its K experts is taken at the replica whose GPU is cheapest to reach from
    there; among equally cheap ones tokens take turns, by the number of their row.
    """
    raise NotImplementedError
