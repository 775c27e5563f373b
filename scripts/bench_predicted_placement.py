"""Measures how good placements are that were solved on predicted routing, and prints a table.

    moe-runtime predictor train T.npz --predictor token_table -o P.safetensors   # and others
    python scripts/bench_predicted_placement.py --trace T.npz P.safetensors ... --gpus 4

Sequences that no predictor was fitted to are dealt out in two halves. A placement is solved on what
`predictor trace` writes of the first half's prompts, and on what was recorded of them; both are
judged on the recorded routing of the second half.
"""

import argparse
from pathlib import Path

import numpy as np

from moe_runtime.errors import PredictorError
from moe_runtime.measure.predicted_trace import predict_trace
from moe_runtime.placement.baselines import linear
from moe_runtime.placement.evaluate import Evaluation, evaluate
from moe_runtime.placement.problem import Problem
from moe_runtime.placement.routing_counts import RoutingCounts
from moe_runtime.placement.solve import solve
from moe_runtime.placement.topology import Topology
from moe_runtime.predictors.split import split_by_sequence
from moe_runtime.predictors.store import load_predictor, split_of
from moe_runtime.trace import Phase, Trace


def main() -> None:
    """Print one row for each predictor."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, required=True, help="recorded, with token ids")
    parser.add_argument("--gpus", type=int, default=4)
    parser.add_argument("--balance", type=float, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("predictors", type=Path, nargs="+", help="fitted with the same split")
    arguments = parser.parse_args()
    splits = {split_of(path) for path in arguments.predictors}
    (split,) = splits  # of one kind, or who was fitted to what is not known
    if split is None:
        raise SystemExit("the predictors were fitted to all sequences; train them anew")
    held_out = split_by_sequence(Trace.load(arguments.trace), split)[1]
    ids = np.unique(held_out.sequence_id)
    is_prompt = held_out.phase == Phase.PREFILL
    prompts = held_out.select(np.isin(held_out.sequence_id, ids[::2]) & is_prompt)
    judged = held_out.select(np.isin(held_out.sequence_id, ids[1::2]))
    print(
        f"{len(ids[::2])} prompts of {prompts.num_tokens:,} tokens solved on, {len(ids[1::2])} "
        f"other sequences of {judged.num_tokens:,} tokens judged; {arguments.gpus} GPUs, load "
        f"limit {arguments.balance}; seed {arguments.seed}\n"
    )
    plain = evaluate(linear(RoutingCounts.of([prompts]), arguments.gpus), [judged])
    recorded = _solved(prompts, judged, arguments)
    print("| solved on | crossing | of the saving | busiest GPU |\n|---|---|---|---|")
    _row("nothing: linear", plain, plain, recorded)
    _row("the recorded prompts", recorded, plain, recorded)
    for path in arguments.predictors:
        predictor = load_predictor(path)
        assert prompts.token_id is not None
        token_ids = [
            prompts.token_id[prompts.sequence_id == sequence].tolist()
            for sequence in np.unique(prompts.sequence_id)
        ]
        try:
            predicted = predict_trace(
                predictor, token_ids, [""] * len(token_ids), lambda done, total: None
            )
        except PredictorError as error:
            print(f"| {predictor.name} | - | - | {error} |")
            continue
        _row(predictor.name, _solved(predicted, judged, arguments), plain, recorded)


def _solved(trace: Trace, judged: Trace, arguments: argparse.Namespace) -> Evaluation:
    counts = RoutingCounts.of([trace])
    problem = Problem(
        counts=counts,
        topology=Topology.flat(arguments.gpus),
        num_slots=counts.num_experts,
        balance=arguments.balance,
    )
    return evaluate(solve(problem, seed=arguments.seed).placement, [judged])


def _row(name: str, found: Evaluation, plain: Evaluation, recorded: Evaluation) -> None:
    saving = plain.crossing_fraction - recorded.crossing_fraction
    share = (plain.crossing_fraction - found.crossing_fraction) / saving
    print(
        f"| {name} | {found.crossing_fraction:.4f} | {share:.0%} | {found.load_max_over_mean:.3f} |"
    )


if __name__ == "__main__":
    main()
