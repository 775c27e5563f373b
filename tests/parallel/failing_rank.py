"""A rank of two, started alone: meets the other and moves rows, until it is told to fail.

python -m tests.parallel.failing_rank die|hang|work SECONDS
"""

import os
import sys
import time

import torch

from moe_runtime.errors import ParallelError
from moe_runtime.parallel.alltoall import AllToAllDispatcher
from moe_runtime.parallel.dispatcher import Rows
from moe_runtime.parallel.plan import ExpertPlan, linear_placement
from moe_runtime.parallel.world import World

STEPS = 1000


def main() -> None:
    """Exit code 3 and one line on stderr if the other is lost."""
    how, seconds = sys.argv[1], float(sys.argv[2])
    world = World.join(timeout_seconds=seconds)
    placement = linear_placement(model="", num_experts=4, num_layers=1, num_ranks=2)
    dispatcher = AllToAllDispatcher(ExpertPlan.of(placement, world.rank), world.ledger)
    rows = Rows(torch.ones(2, 8), torch.tensor([[0, 3], [2, 1]]), torch.ones(2, 2))
    print("met", flush=True)
    try:
        for step in range(STEPS):
            here, state = dispatcher.dispatch(0, rows, [2, 2])
            dispatcher.combine(here.hidden, state)
            if step == 2 and how == "die":
                os._exit(9)
            if step == 2 and how == "hang":
                time.sleep(600)
            time.sleep(0.01)
    except ParallelError as error:
        sys.stderr.write(f"{error}\n")
        sys.stderr.flush()
        os._exit(3)


if __name__ == "__main__":
    main()
