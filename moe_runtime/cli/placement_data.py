"""What commands of `moe-runtime placement` read: traces, split for judging, and a topology."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moe_runtime.cli.terminal import Terminal

if TYPE_CHECKING:
    from moe_runtime.placement.topology import Topology
    from moe_runtime.trace import Trace

# What placements never look at, and what makes traces large.
_UNUSED = ("weights", "gate_probs", "hidden")


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitTraces:
    """Traces to learn from and traces to be judged by; the second may be empty."""

    learn: "list[Trace]"
    held_out: "list[Trace]"


def give_blas_one_thread() -> None:
    """To be called before numpy is loaded; what the user set stays.

    A search computes in a process for each core. Threads of BLAS in all of them wait for each other
    (measured on two cores: 51 s instead of 15 for 58 layers of 256 experts on 64 GPUs).
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def load_traces(files: Sequence[Path], num_experts: int | None) -> "list[Trace]":
    """Every file, without what placements do not use."""
    from moe_runtime.trace import Trace

    return [Trace.load(file, num_experts=num_experts, leave_out=_UNUSED) for file in files]


def split_traces(terminal: Terminal, traces: "Sequence[Trace]", share: float) -> SplitTraces:
    """Each trace on its own, by sequence; says where nothing could be held out."""
    from moe_runtime.trace_split import split_by_sequence

    parts = [split_by_sequence(trace, share) for trace in traces]
    held_out = [judge for _, judge in parts if judge is not None]
    if share and not held_out:
        terminal.warn(
            "every domain of the traces is one sequence, so nothing is held out and all figures "
            "are of the very tokens that were solved for; judge with `placement evaluate` on others"
        )
    return SplitTraces(learn=[learn for learn, _ in parts], held_out=held_out)


def read_topology(file: Path | None, *, gpus: int, nodes: int) -> "Topology":
    """Of the file, or flat within equal nodes."""
    from moe_runtime.errors import PlacementError
    from moe_runtime.placement.topology import Topology

    if file is None:
        return Topology.of_nodes(nodes, gpus) if nodes > 1 else Topology.flat(gpus)
    topology = Topology.load(file, nodes=nodes)
    if topology.gpus != gpus:
        raise PlacementError(
            f"{file} has costs for {topology.gpus} GPUs, and there are {gpus}; make them equal"
        )
    return topology
