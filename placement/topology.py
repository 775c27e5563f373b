"""What it costs to send a token from one GPU to another."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_runtime.config import load_config
from moe_runtime.errors import PlacementError

Array = np.ndarray[Any, Any]

_REMEDY = 'write {"rank_cost_matrix": [[0, 1], [1, 0]]} with a row and a column for each GPU'


@dataclass(frozen=True, slots=True, kw_only=True)
class _TopologyFile:
    """The file's schema, as SGLang's proposal for topology-aware balancing has it."""

    rank_cost_matrix: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Topology:
    """`costs[a, b]`: the price of one token's hop from GPU a to GPU b; 0 on the diagonal.

    GPUs stand in the order of ranks, and each node holds equally many consecutive ones.
    """

    costs: Array  # [G, G] float64
    nodes: int

    @classmethod
    def flat(cls, gpus: int) -> "Topology":
        """Every hop costs 1."""
        return cls.of_nodes(1, gpus, intra=1.0, inter=1.0)

    @classmethod
    def of_nodes(
        cls, nodes: int, gpus: int, *, intra: float = 1.0, inter: float = 2.0
    ) -> "Topology":
        """A hop costs `intra` within a node and `inter` between nodes."""
        if gpus < 1:
            raise PlacementError(f"{gpus} GPUs cannot hold experts; give at least 1")
        if nodes < 1 or gpus % nodes:
            raise PlacementError(
                f"{gpus} GPUs do not divide among {nodes} nodes; give every node equally many"
            )
        node = np.arange(gpus) // (gpus // nodes)
        costs = np.where(node[:, None] == node[None, :], intra, inter).astype(np.float64)
        np.fill_diagonal(costs, 0.0)
        return cls.from_matrix(costs, nodes=nodes)

    @classmethod
    def from_matrix(cls, costs: object, *, nodes: int = 1) -> "Topology":
        """From any square matrix of costs that are finite, at least 0, and 0 on the diagonal."""
        matrix = np.array(costs, dtype=np.float64)
        _check(matrix, "the matrix")
        if nodes < 1 or len(matrix) % nodes:
            raise PlacementError(
                f"{len(matrix)} GPUs do not divide among {nodes} nodes; give every node equally "
                "many"
            )
        matrix.setflags(write=False)
        return cls(costs=matrix, nodes=nodes)

    @classmethod
    def load(cls, path: str | Path, *, nodes: int = 1) -> "Topology":
        """From JSON or YAML with the one key `rank_cost_matrix`."""
        rows = load_config(_TopologyFile, Path(path), remedy=_REMEDY).rank_cost_matrix
        if len({len(row) for row in rows} | {len(rows)}) != 1:
            lengths = sorted({len(row) for row in rows})
            raise PlacementError(
                f"{path}: rank_cost_matrix has {len(rows)} rows of {lengths} entries; it must be "
                f"square: {_REMEDY}"
            )
        _check(np.array(rows, dtype=np.float64), str(path))
        return cls.from_matrix(rows, nodes=nodes)

    @property
    def gpus(self) -> int:
        return len(self.costs)

    @property
    def is_flat(self) -> bool:
        """Whether all hops cost the same, so that GPUs can change names."""
        return bool(self.gpus == 1 or np.ptp(self.costs[~np.eye(self.gpus, dtype=bool)]) == 0)

    @property
    def is_symmetric(self) -> bool:
        return bool(np.array_equal(self.costs, self.costs.T))

    def node_of(self) -> Array:
        """`[G]` int: the node of each GPU."""
        return np.arange(self.gpus) // (self.gpus // self.nodes)


def _check(matrix: Array, source: str) -> None:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise PlacementError(
            f"{source}: costs have shape {list(matrix.shape)}; they must be square, GPUs x GPUs"
        )
    wrong = np.argwhere(~np.isfinite(matrix) | (matrix < 0))
    if wrong.size:
        a, b = (int(i) for i in wrong[0])
        raise PlacementError(
            f"{source}: the cost from GPU {a} to GPU {b} is {matrix[a, b]}; costs must be finite "
            "and at least 0"
        )
    if np.diagonal(matrix).any():
        gpu = int(np.flatnonzero(np.diagonal(matrix))[0])
        raise PlacementError(
            f"{source}: the cost from GPU {gpu} to itself is {matrix[gpu, gpu]}; staying costs 0"
        )
