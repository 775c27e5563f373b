"""A rank of two, started alone: meets the other and moves rows, until it is told to fail.

python -m tests.parallel.failing_rank die|hang|work|migrate|migrate-and-die SECONDS
"""

import os
import sys
import time
from dataclasses import replace

import torch

from moe_runtime.errors import ParallelError
from moe_runtime.expert import ExpertKey
from moe_runtime.parallel.alltoall import AllToAllDispatcher
from moe_runtime.parallel.dispatcher import Rows
from moe_runtime.parallel.migrate import Migration, Stored, migrate
from moe_runtime.parallel.plan import ExpertPlan, linear_placement
from moe_runtime.parallel.world import World
from moe_runtime.placement_map import Placement

STEPS = 1000


def main() -> None:
    """Exit code 3 and one line on stderr if the other is lost."""
    how, seconds = sys.argv[1], float(sys.argv[2])
    world = World.join(timeout_seconds=seconds)
    placement = linear_placement(model="", num_experts=4, num_layers=1, num_ranks=2)
    if how.startswith("migrate"):
        move_experts(world, placement, is_to_die=how == "migrate-and-die")
        return
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


class Experts:
    """Every expert is 64 bytes in memory; dies, if it is to, when the first is asked for again."""

    def __init__(self, *, is_to_die: bool) -> None:
        self.is_to_die = is_to_die
        self.num_asked = 0

    def blob_bytes(self, key: ExpertKey) -> int:
        return 64

    def resident_blob(self, key: ExpertKey) -> torch.Tensor:
        self.num_asked += 1
        if self.is_to_die and self.num_asked > 1:
            os._exit(9)
        return torch.full((64,), key.expert, dtype=torch.uint8)

    def accept(self, key: ExpertKey, blob: torch.Tensor) -> None:
        assert (blob == key.expert).all()

    def forget(self, key: ExpertKey) -> None:
        pass


def move_experts(world: World, before: Placement, *, is_to_die: bool) -> None:
    """Experts 1 and 2 change places."""
    after = replace(before, slots=before.slots[:, [0, 2, 1, 3]])
    stored = Stored(Experts(is_to_die=is_to_die), "plain")
    try:
        migrate(world.ledger, Migration.between(before, after), stored)
    except ParallelError as error:
        sys.stderr.write(f"{error}\n")
        sys.stderr.flush()
        os._exit(3)


if __name__ == "__main__":
    main()
