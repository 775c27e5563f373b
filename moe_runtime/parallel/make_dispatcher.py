"""Dispatchers by their names, as users ask for them."""

from typing import Any

from moe_runtime.parallel.allreduce import AllReduceDispatcher
from moe_runtime.parallel.alltoall import AllToAllDispatcher
from moe_runtime.parallel.auto import AutoDispatcher
from moe_runtime.parallel.dispatcher import Dispatcher
from moe_runtime.parallel.hierarchical import HierarchicalDispatcher
from moe_runtime.parallel.local import LocalDispatcher
from moe_runtime.parallel.node_links import NodeLinks
from moe_runtime.parallel.payload import ExactPayload, Payload, make_payload
from moe_runtime.parallel.plan import ExpertPlan
from moe_runtime.parallel.world import World
from moe_runtime.perf.interconnect import Interconnect

DISPATCHES = ("auto", "alltoall", "allreduce", "hierarchical", "coherent", "speculative")
ATTENTIONS = ("data", "tensor")  # whole, for prompts of a rank's own; a share of the heads


def make_dispatcher(
    name: str,
    world: World,
    plan: ExpertPlan,
    payload: Payload,
    network: Interconnect | None,
) -> Dispatcher[Any]:
    """The dispatcher of that name; that of one process where there is one.

    Under coherent and speculative dispatch it serves what is not stepped from outside. `network`
    is what messages cost, where that is known.
    """
    assert name in DISPATCHES, name
    if world.num_ranks == 1:
        return LocalDispatcher()
    if name == AllReduceDispatcher.name:
        return AllReduceDispatcher(plan, world.ledger)
    if name == AutoDispatcher.name:
        return AutoDispatcher(plan, world.ledger, payload, _links(plan, network))
    kind = HierarchicalDispatcher if name == HierarchicalDispatcher.name else AllToAllDispatcher
    return kind(plan, world.ledger, payload)


def _links(plan: ExpertPlan, network: Interconnect | None) -> NodeLinks | None:
    if network is None:
        return None
    return NodeLinks.of(
        network,
        num_nodes=plan.num_nodes,
        num_ranks=plan.num_ranks,
        num_experts=plan.num_experts,
    )


def check_dispatch(dispatch: str, payload: str) -> None:
    """Raise ValueError for a name that is unknown, or a pair that makes no sense."""
    if dispatch not in DISPATCHES:
        raise ValueError(f"dispatch {dispatch!r} is unknown; choose from {', '.join(DISPATCHES)}")
    make_payload(payload)
    if dispatch == AllReduceDispatcher.name and payload != ExactPayload.name:
        raise ValueError(
            f"payload {payload!r} rounds rows, and dispatch 'allreduce' adds sums up on their way; "
            "leave payload out, or choose alltoall, hierarchical or auto"
        )
