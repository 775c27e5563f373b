"""Writes what every access of a replay hit, so that others can check it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moe_runtime.simulate.accesses import Accesses
from moe_runtime.simulate.replay import SimulationResult
from moe_runtime.trace_file import Member, write_npz


def write_steps(path: Path, accesses: Accesses, results: Sequence[SimulationResult]) -> None:
    """An `.npz` of arrays `[A]`, one entry an access, in the order of the replay.

    `step` as the trace numbers it, `layer` and `expert`; and for each policy and size a boolean
    `hit_<policy>_<slots>`.
    """
    arrays = {
        "step": np.repeat(accesses.step, np.diff(accesses.bounds)),
        "layer": accesses.layer.astype(np.int16),
        "expert": accesses.expert.astype(np.int16),
    }
    for result in results:
        assert result.is_hit is not None
        arrays[f"hit_{result.policy}_{result.slots}"] = result.is_hit
    write_npz(path, [Member.of(name, array) for name, array in arrays.items()])
