"""The dispatcher of one process: every expert is here."""

import torch

from moe_runtime.parallel.dispatcher import Rows


class LocalDispatcher:
    """The same two verbs without a collective."""

    name = "local"

    def dispatch(self, layer: int, rows: Rows, tokens_by_rank: list[int]) -> tuple[Rows, None]:
        """All rows, as they are."""
        return rows, None

    def combine(self, output_RD: torch.Tensor, state: None) -> torch.Tensor:
        """What was computed."""
        return output_RD
