"""Decodes with prediction on and off in turn, on replayed routing, and compares the time.

python scripts/bench_prefetch.py MODEL TRACE.npz --predictor oracle --pairs 30
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from moe_runtime.measure.bench.prefetch_pairs import PairsRequest, run_pairs
from moe_runtime.trace import Phase, Trace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("trace", type=Path)
    parser.add_argument(
        "--predictor", default="auto", help="auto, gate_lookahead, oracle, or a file"
    )
    parser.add_argument("--expert-memory", default="35%")
    parser.add_argument("--policy", default="lru")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--block", type=int, default=4, help="tokens a turn")
    parser.add_argument("--warm", type=int, default=24, help="tokens before the first pair")
    parser.add_argument("--first-row", type=int, default=0, help="where in the trace to begin")
    parser.add_argument("--open", action="store_true", help="without the gate on benefit")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    trace = Trace.load(arguments.trace, leave_out=("gate_probs", "weights"))
    rows = np.flatnonzero(trace.phase != Phase.PADDING)[arguments.first_row :]
    rows = rows[: arguments.warm + 2 * arguments.pairs * arguments.block + 1]
    found = run_pairs(
        PairsRequest(
            model=arguments.model,
            trace=trace.select(rows),
            predictor=arguments.predictor,
            expert_memory=arguments.expert_memory,
            policy=arguments.policy,
            num_pairs=arguments.pairs,
            block_tokens=arguments.block,
            warm_tokens=arguments.warm,
            is_gated=not arguments.open,
        ),
        on_pair=lambda done, total: None,
    )
    text = json.dumps(asdict(found), indent=1)
    if arguments.output is not None:
        arguments.output.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
