"""What the benchmark asks of a contestant, ours or a peer."""

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from moe_runtime.measure.bench.job import Job


class Peer(Protocol):
    """A loaded model that decodes forced tokens one at a time, in a process of its own.

    Each contestant's file of this folder has a `load`, as Loader says; what the file imports counts
    as the process's own memory, and what `load` takes as the model's.
    """

    def start(self, variant: str, first_row: int) -> None:
        """Forget all tokens. `first_row` of a replayed trace belongs to the next token."""

    def step(self, token: int) -> None:
        """Decode one token; returns once it is done."""

    def logits(self) -> npt.NDArray[np.float32]:
        """`[V]`, of the last step."""

    def counters(self) -> dict[str, int]:
        """What it counts itself, since it was loaded: hits, misses, bytes_read."""


class Loader(Protocol):
    """The module of a contestant."""

    def load(self, job: Job) -> tuple[Peer, dict[str, Any]]:
        """Make the model ready; the second are facts for the report."""
