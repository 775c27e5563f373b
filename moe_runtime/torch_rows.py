"""The routed rows of one layer on the device, one expert after the other as the reference goes."""

import itertools
from collections.abc import Mapping, Sequence

import torch

from moe_runtime.layer import ExpertMath
from moe_runtime.memory.device_slots import DeviceSlots
from moe_runtime.memory.layout import ExpertLayout
from moe_runtime.memory.stream import Stream

# T tokens, K top-k, E experts, D model dim, R = T * K rows, n of one expert


class TorchRows:
    """Rows sorted by expert and, within one, by top-k position, then token: as Dispatch has them.

    That order fixes the bits of an expert's products, and each token's rows are added up in
    ascending order of experts: what comes out has the reference's bits on the same device.
    """

    def __init__(
        self,
        math: ExpertMath,
        slots: DeviceSlots,
        layout: ExpertLayout,
        hidden_TD: torch.Tensor,
        top_k_index_TK: torch.Tensor,
        top_k_weights_TK: torch.Tensor,
    ) -> None:
        num_tokens, top_k = top_k_index_TK.shape
        num_rows, device = num_tokens * top_k, hidden_TD.device
        self._math = math
        self._weights_in = slots.weights
        self._layout = layout
        self._hidden_TD = hidden_TD
        self._index_TK = top_k_index_TK
        self._weights_TK = top_k_weights_TK
        self._token_R = torch.empty(num_rows, dtype=torch.int64, device=device)
        self._weight_R1 = top_k_weights_TK.new_empty(num_rows, 1)
        self._place_TK = torch.empty_like(self._token_R).view(num_tokens, top_k)
        # Rows of experts of other ranks are never computed and must add nothing.
        self.output_RD = hidden_TD.new_zeros(num_rows, hidden_TD.shape[1])
        self._ends: list[int] = []
        self._slots: Mapping[int, int] = {}

    def sort(self, compute: Stream) -> None:
        """Queue the sort of the rows."""
        compute.launch(self._sort)

    def place(self, counts: Sequence[int], slots: Mapping[int, int], compute: Stream) -> None:
        """Expert e has `counts[e]` rows and, if the device computes it, is in `slots[e]`."""
        self._ends = list(itertools.accumulate(counts, initial=0))
        self._slots = slots

    def rows_of(self, expert: int) -> slice:
        """Its rows of `output_RD`."""
        return slice(self._ends[expert], self._ends[expert + 1])

    def tokens_of(self, expert: int, index_TK: torch.Tensor) -> torch.Tensor:
        """The tokens of its rows, by the routing on the host."""
        return (index_TK.t() == expert).nonzero()[:, 1]

    def compute(self, experts: Sequence[int], compute: Stream) -> None:
        """Queue the products of `experts`."""
        for expert in experts:
            weights = self._weights_in(self._slots[expert], self._layout, compute)
            rows = self.rows_of(expert)
            compute.launch(lambda w=weights, r=rows: self._compute(w, r))  # type: ignore[misc]

    def combine(self, total_TD: torch.Tensor, compute: Stream) -> None:
        """Queue the weighted sum of each token's rows."""
        compute.launch(lambda: self._combine(total_TD))

    def _sort(self) -> None:
        num_tokens, top_k = self._index_TK.shape
        order_R = torch.sort(self._index_TK.t().reshape(-1), stable=True).indices
        self._token_R.copy_(order_R % num_tokens)
        self._weight_R1.copy_(self._weights_TK.t().reshape(-1)[order_R].unsqueeze(1))
        place_R = torch.empty_like(order_R)
        place_R[order_R] = torch.arange(len(order_R), device=order_R.device)
        self._place_TK.copy_(place_R.view(top_k, num_tokens).t().sort(dim=1).values)

    def _compute(self, weights: dict[str, torch.Tensor], rows: slice) -> None:
        self.output_RD[rows] = self._math(self._hidden_TD[self._token_R[rows]], weights)

    def _combine(self, total_TD: torch.Tensor) -> None:
        dtype = self._math.accumulator.dtype(total_TD.dtype, self._weight_R1.dtype)
        sums_TD = torch.zeros_like(total_TD, dtype=dtype)
        for place_T in self._place_TK.unbind(1):
            sums_TD += (self.output_RD[place_T] * self._weight_R1[place_T]).to(dtype)
        total_TD.copy_(sums_TD)
