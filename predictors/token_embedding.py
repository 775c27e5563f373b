"""Vectors of token ids within a budget: a row each, or hashed rows where there are too many ids."""

import numpy as np
import torch
from torch import Tensor, nn

from moe_runtime.trace_fields import Array

_MIXERS = (2654435761, 2246822519)  # odd numbers that spread neighbouring ids


class TokenEmbedding(nn.Module):
    """`[..., W]` of ids. With fewer rows than ids an id is the sum of two rows, by two hashes.

    Row 0 is the unknown id, -1.
    """

    def __init__(self, num_ids: int, num_rows: int, width: int) -> None:
        super().__init__()
        self.num_ids = num_ids
        self.num_rows = min(num_ids, num_rows)
        self.rows = nn.Embedding(1 + self.num_rows, width)
        nn.init.normal_(self.rows.weight, std=0.5)

    def forward(self, token_id: Tensor) -> Tensor:
        is_known = (token_id >= 0) & (token_id < self.num_ids)
        if self.num_rows == self.num_ids:
            found: Tensor = self.rows(torch.where(is_known, token_id + 1, 0))
            return found
        total = torch.zeros(())
        for mixer in _MIXERS:
            mixed = (token_id * mixer) % (2**31) % self.num_rows
            total = total + self.rows(torch.where(is_known, mixed + 1, 0))
        return total

    def start_from(self, embedding: Array) -> None:
        """Take the main axes of the model's own embedding `[V, D]`, where each id has a row."""
        if self.num_rows != self.num_ids or len(embedding) < self.num_ids:
            return
        own = embedding[: self.num_ids].astype(np.float32)
        centred = own - own.mean(0)
        _, axes = np.linalg.eigh(centred.T @ centred)
        width = self.rows.embedding_dim
        reduced = centred @ axes[:, ::-1][:, :width]
        reduced *= 0.5 / max(float(reduced.std()), 1e-9)
        with torch.no_grad():
            self.rows.weight[1:, : reduced.shape[1]] = torch.from_numpy(reduced)
