"""Measures the placement solvers and prints the tables of docs/benchmarks/placement_*.md.

    python scripts/bench_placement.py --trace gptoss20b.npz --part gpt-oss > part.md

Parts: gpt-oss, small, deepseek, replicas, domains. Each is one table and takes some ten seconds to
two minutes; nothing else should run. Set OPENBLAS_NUM_THREADS=1, as `placement solve` does.
"""

import argparse
import platform
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np

from moe_runtime.measure.bench.machine import git_commit
from moe_runtime.measure.processor import this_processor
from moe_runtime.measure.software_checks import installed_version
from moe_runtime.placement.anneal_status import anneal_status
from moe_runtime.placement.baselines import eplb, linear
from moe_runtime.placement.eplb import eplb_slots
from moe_runtime.placement.evaluate import Evaluation, evaluate
from moe_runtime.placement.problem import Problem
from moe_runtime.placement.replicate import busiest_over_mean, replicate
from moe_runtime.placement.result import PlacementResult
from moe_runtime.placement.routing_counts import RoutingCounts
from moe_runtime.placement.solve import solve
from moe_runtime.placement.topology import Topology
from moe_runtime.trace import Trace
from moe_runtime.trace_split import split_by_sequence

Array = np.ndarray[Any, Any]

LAYERS, EXPERTS = 58, 256  # DeepSeek-V3's


def main() -> None:
    """Measure one part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, help="a gpt-oss-20b trace, for gpt-oss and domains")
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--gpus", type=int, help="only rows with so many GPUs")
    parser.add_argument(
        "--balances", type=_balances, default=(None, 1.12, 1.1, 1.08, 1.06), metavar="LIMIT,...",
        help="limits of gpt-oss; none is no limit (default: none,1.12,1.1,1.08,1.06)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    packages = ", ".join(f"{name} {installed_version(name)}" for name in ("numpy", "scipy", "pulp"))
    print(
        f"{this_processor().model}, {this_processor().usable_cores} cores; Python "
        f"{platform.python_version()}, {packages}; annealing {anneal_status()}; commit "
        f"{git_commit()}; seed {arguments.seed}\n"
    )
    PARTS[arguments.part](arguments)
    used = [resource.getrusage(who).ru_maxrss for who in WHO]
    print(f"\npeak memory {used[0] / 1e6:.2f} GB, and {used[1] / 1e6:.2f} GB in a worker")


WHO = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)


def measure_gpt_oss(arguments: argparse.Namespace) -> None:
    """Crossings and load on held-out sequences."""
    learn, held_out = _split(arguments.trace)
    counts = RoutingCounts.of([learn])
    print(
        f"{learn.num_tokens:,} tokens solved on, {held_out.num_tokens:,} of other sequences "
        "judged\n"
    )
    _head(
        "GPUs", "placement", "crossing, solved on", "crossing, held out", "load, solved on",
        "load, held out", "load of 256, held out", "fan-out", "busiest layer, solved on",
        "lower bound", "stopped by", "seconds",
    )  # fmt: skip
    for gpus in (4, 8) if arguments.gpus is None else (arguments.gpus,):
        _judge(gpus, "linear", linear(counts, gpus), learn, held_out, None)
        published = eplb(counts, gpus, num_slots=counts.num_experts)
        _judge(gpus, "EPLB as published", published, learn, held_out, None)
        for balance in arguments.balances:
            problem = Problem(
                counts=counts,
                topology=Topology.flat(gpus),
                num_slots=counts.num_experts,
                balance=balance,
            )
            result = solve(problem, seed=arguments.seed)
            name = "no limit" if balance is None else f"--balance {balance}"
            _judge(gpus, name, result.placement, learn, held_out, result)


def measure_small(arguments: argparse.Namespace) -> None:
    """Eight experts, proven optimal."""
    _head("GPUs", "layers", "objective", "status", "solver", "seconds")
    rng = np.random.default_rng(arguments.seed)
    for gpus in (2, 4, 8):
        counts = _counts(rng.gamma(0.5, 100.0, (31, 8, 8)))
        result = solve(Problem(counts=counts, topology=Topology.flat(gpus), num_slots=8))
        _row(
            gpus, 32, f"{result.objective:.4f}", str(result.status), result.solver,
            f"{result.seconds:.2f}",
        )  # fmt: skip
    counts = _counts(rng.gamma(0.5, 100.0, (31, 16, 16)))
    result = solve(Problem(counts=counts, topology=Topology.flat(2), num_slots=16))
    _row(
        "2, of 16 experts", 32, f"{result.objective:.4f}", str(result.status), result.solver,
        f"{result.seconds:.2f}",
    )  # fmt: skip


def measure_deepseek(arguments: argparse.Namespace) -> None:
    """58 layers of 256 experts: planted groups plus noise."""
    _head("GPUs", "nodes", "slots", "objective", "lower bound", "gap", "stopped by", "seconds")
    counts = _counts(planted_flow(arguments.seed))
    for gpus, slots, nodes in ((8, 256, 1), (32, 256, 1), (32, 256, 4), (64, 256, 1), (64, 320, 1)):
        if arguments.gpus not in (None, gpus):
            continue
        problem = Problem(
            counts=counts,
            topology=Topology.of_nodes(nodes, gpus, inter=2.0 if nodes > 1 else 1.0),
            num_slots=slots,
        )
        result = solve(problem, seed=arguments.seed)
        _row(
            gpus, nodes, slots, f"{result.objective:.4f}", f"{result.lower_bound:.4f}",
            f"{result.gap:.4f}", str(result.stopped_by), f"{result.seconds:.1f}",
        )  # fmt: skip


def measure_replicas(arguments: argparse.Namespace) -> None:
    """Busiest GPU over the mean beside EPLB's, loads alone."""
    _head("experts", "GPUs", "slots", "EPLB", "duplicates in EPLB", "ours", "seconds, ours")
    rng = np.random.default_rng(arguments.seed)
    for experts, gpus, slots in ((64, 8, 72), (128, 16, 144), (256, 32, 288), (256, 64, 320)):
        loads = rng.random((LAYERS, experts)) ** 4 * 1000
        slots_LS = eplb_slots(loads, num_slots=slots, num_groups=1, num_nodes=1, num_gpus=gpus)
        rank = np.broadcast_to(np.arange(slots) // (slots // gpus), slots_LS.shape)
        theirs = busiest_over_mean(loads, slots_LS, rank, gpus).mean()
        ordered = np.sort(slots_LS.reshape(LAYERS, gpus, -1), axis=2)
        duplicates = int((ordered[..., 1:] == ordered[..., :-1]).sum())
        began = time.monotonic()
        expert, gpu = replicate(loads, slots, gpus)
        seconds = time.monotonic() - began
        ours = busiest_over_mean(loads, expert, gpu, gpus).mean()
        _row(experts, gpus, slots, f"{theirs:.4f}", duplicates, f"{ours:.4f}", f"{seconds:.1f}")


def measure_domains(arguments: argparse.Namespace) -> None:
    """Solved on one half of the sequences by their mean top expert, judged on the other.

    The trace names no domains; sequences are ordered by how often they use the expert that varies
    most between sequences, which is as unlike as two halves of it get.
    """
    trace = Trace.load(arguments.trace, leave_out=["weights"])
    ids, sequence = np.unique(trace.sequence_id, return_inverse=True)
    use = np.stack(
        [
            np.bincount(sequence, trace.topk[:, 12, 0] == expert, minlength=len(ids))
            for expert in range(trace.num_experts)
        ]
    ) / np.bincount(sequence)
    share = use[use.std(axis=1).argmax()]
    is_first = (share <= np.median(share))[sequence]
    halves = {"low": trace.select(is_first), "high": trace.select(~is_first)}
    _head("solved on", "judged on", "crossing", "load", "linear: crossing", "linear: load")
    for name, half in halves.items():
        counts = RoutingCounts.of([half])
        problem = Problem(counts=counts, topology=Topology.flat(4), num_slots=32, balance=1.1)
        placement = solve(problem, seed=arguments.seed).placement
        for other, judged in halves.items():
            found = evaluate(placement, [judged])
            plain = evaluate(linear(counts, 4), [judged])
            _row(
                name, other, f"{found.crossing_fraction:.4f}", f"{found.load_max_over_mean:.3f}",
                f"{plain.crossing_fraction:.4f}", f"{plain.load_max_over_mean:.3f}",
            )  # fmt: skip


PARTS = {
    "gpt-oss": measure_gpt_oss,
    "small": measure_small,
    "deepseek": measure_deepseek,
    "replicas": measure_replicas,
    "domains": measure_domains,
}


def planted_flow(seed: int, *, num_tokens: float = 1e6, stay: float = 0.5) -> Array:
    """`[57, 256, 256]`: each layer has 32 hidden groups of 8; a token stays in its group or not.

    A token stays with probability `stay` and is then anywhere in the group of the next layer; else
    it follows a noise row of its expert (gamma of shape 0.3, a few likely experts each). Experts
    differ in how popular they are (gamma of shape 2).
    """
    rng = np.random.default_rng(seed)
    group = np.stack([rng.permutation(EXPERTS) for _ in range(LAYERS)]) // 8
    flow = np.empty((LAYERS - 1, EXPERTS, EXPERTS))
    for layer in range(LAYERS - 1):
        same = (group[layer][:, None] == group[layer + 1][None, :]) / 8
        noise = rng.gamma(0.3, 1.0, (EXPERTS, EXPERTS))
        popular = rng.gamma(2.0, 1.0, EXPERTS)
        mixed = stay * same + (1 - stay) * noise / noise.sum(axis=1, keepdims=True)
        flow[layer] = num_tokens * (popular / popular.sum())[:, None] * mixed
    return flow


def _balances(words: str) -> tuple[float | None, ...]:
    return tuple(None if word == "none" else float(word) for word in words.split(","))


def _counts(flow: Array) -> RoutingCounts:
    num_layers, num_experts = len(flow) + 1, flow.shape[1]
    return RoutingCounts(
        model="synthetic",
        num_experts=num_experts,
        num_hidden_layers=num_layers,
        layer_ids=tuple(range(num_layers)),
        top_k=1,
        num_tokens=round(float(flow[0].sum())),
        transitions=flow,
        pair_transitions=flow,
        loads=np.concatenate([flow.sum(axis=2), flow[-1:].sum(axis=1)]),
        coactivation=np.zeros((num_layers, num_experts, num_experts)),
    )


def _split(path: Path) -> tuple[Trace, Trace]:
    learn, held_out = split_by_sequence(Trace.load(path, leave_out=["weights"]), 0.2)
    assert held_out is not None
    return learn, held_out


def _judge(
    gpus: int,
    name: str,
    placement: Any,
    learn: Trace,
    held_out: Trace,
    result: PlacementResult | None,
) -> None:
    seen, new = evaluate(placement, [learn]), evaluate(placement, [held_out])
    _row(
        gpus, name, f"{seen.crossing_fraction:.4f}", f"{new.crossing_fraction:.4f}",
        f"{seen.load_max_over_mean:.3f}", f"{new.load_max_over_mean:.3f}",
        f"{new.load_max_over_mean_256:.3f}", f"{new.fanout:.2f}", f"{_busiest(seen):.3f}",
        "" if result is None else f"{result.lower_bound:.4f}",
        "" if result is None else str(result.stopped_by),
        "" if result is None else f"{result.seconds:.1f}",
    )  # fmt: skip


def _busiest(found: Evaluation) -> float:
    return max(layer.load_max_over_mean for layer in found.per_layer)


def _head(*names: str) -> None:
    _row(*names)
    print("|" + "---|" * len(names))


def _row(*cells: object) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
