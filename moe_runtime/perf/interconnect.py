"""The interconnect file: what messages and products cost, by `probe --collectives`."""

from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated

from moe_runtime.config import Plausible, load_config, parse_config, plain_config, save_config
from moe_runtime.perf.alpha_beta import AlphaBeta

_REMEDY = "measure again with torchrun --nproc-per-node N -m moe_runtime probe --collectives"
Count = Annotated[int, Plausible(1, 1_000_000)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Interconnect:
    """Of collectives n is the bytes that leave a rank; of products, floating-point operations.

    A product is of rows with one weight matrix of `weight_shape`, which it reads whole: so its
    alpha is for that matrix, and grows with its size. `within_node` and `between_nodes` are
    all-to-alls among the ranks of a node, and among one rank of each; None on one node, or with a
    rank a node.
    """

    measured_on: date
    ranks: Count
    nodes: Count
    backend: str
    device: str
    dtype: str  # of products
    weight_shape: tuple[Count, Count]
    all_to_all: AlphaBeta
    all_gather: AlphaBeta
    reduce_scatter: AlphaBeta
    product: AlphaBeta
    within_node: AlphaBeta | None = None
    between_nodes: AlphaBeta | None = None

    @classmethod
    def load(cls, path: Path) -> "Interconnect":
        """Read a file. Raises ConfigError naming the field, its value and the range."""
        return load_config(cls, path, remedy=_REMEDY)

    def save(self, path: Path) -> None:
        """Write what `load` reads back as an equal object. Raises ConfigError."""
        parse_config(Interconnect, self.as_dict(), source="this measurement", remedy=_REMEDY)
        save_config(
            self, path, heading="Collectives, as `moe-runtime probe --collectives` writes them."
        )

    def as_dict(self) -> dict[str, object]:
        """Mappings, lists and scalars."""
        return plain_config(self)
