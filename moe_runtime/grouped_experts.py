"""The experts of one layer in grouped products of Triton, straight from a slab of slots."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial

import torch

from moe_runtime.kernel_settings import KernelSettings, LayerSettings, layer_settings
from moe_runtime.kernels.combine import combine
from moe_runtime.kernels.gate import Gate
from moe_runtime.kernels.grouped_gemm import down, gate_up
from moe_runtime.kernels.permute import SortedPairs, max_blocks, sort_pairs
from moe_runtime.kernels.slot_weights import SlotWeights
from moe_runtime.layer import ExpertMath
from moe_runtime.memory.stream import Stream
from moe_runtime.stored_weights import StoredWeight

# T tokens, K top-k, E experts, D model dim, F ffn dim, S slots, B blocks of b rows, R = B * b rows


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedExperts:
    """Computes `math` with other rounding: sums in float32, rounded once for each product and sum.

    Bits depend on the tokens, their experts and the settings for so many pairs, not on which slots
    hold the experts, nor on how many calls compute them. `gate` None: `math`'s own gate runs in
    torch between the products. `gpu_name` None: Triton's interpreter runs on the CPU. Parameters in
    `stored` are read as slots hold them quantised, and become numbers in registers.
    """

    math: ExpertMath
    gate: Gate | None
    num_experts: int
    model_dim: int
    ffn_dim: int
    gpu_name: str | None
    stored: Mapping[str, StoredWeight] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return "triton" if self.gate is not None else "triton, gate in torch"

    def run(
        self,
        hidden_TD: torch.Tensor,
        top_k_index_TK: torch.Tensor,
        top_k_weights_TK: torch.Tensor,
        stacked: Mapping[str, torch.Tensor],
        slots_E: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's output `[T, D]`, and the rows of each expert `[E]`; never waits."""
        settings = self.settings(hidden_TD, top_k_index_TK)
        order = self.sort(top_k_index_TK, settings)
        y_RD = self.products(hidden_TD, order, stacked, slots_E, settings)
        return combine(y_RD, order.rows_TK, top_k_weights_TK), order.counts_E

    def rows(
        self,
        hidden_TD: torch.Tensor,
        top_k_index_TK: torch.Tensor,
        top_k_weights_TK: torch.Tensor,
        stacked: Mapping[str, torch.Tensor],
    ) -> "GroupedRows":
        """The same layer, expert by expert as they arrive."""
        return GroupedRows(self, hidden_TD, top_k_index_TK, top_k_weights_TK, stacked)

    def settings(self, hidden_TD: torch.Tensor, top_k_index_TK: torch.Tensor) -> LayerSettings:
        """How the products of these rows are cut."""
        return _settings(
            self.gpu_name,
            top_k_index_TK.numel(),
            self.num_experts,
            self.model_dim,
            self.ffn_dim,
            hidden_TD.dtype.itemsize,
        )

    def sort(self, top_k_index_TK: torch.Tensor, settings: LayerSettings) -> SortedPairs:
        """Pairs by expert, in whole blocks."""
        return sort_pairs(
            top_k_index_TK, num_experts=self.num_experts, block_rows=settings.block_rows
        )

    def products(
        self,
        hidden_TD: torch.Tensor,
        order: SortedPairs,
        stacked: Mapping[str, torch.Tensor],
        slots_E: torch.Tensor,
        settings: LayerSettings,
    ) -> torch.Tensor:
        """Outputs of the rows of `order`, not weighted; rows of padding hold anything."""
        math = self.math
        up, down_weights = self._weights(stacked, math.up_name), self._weights(stacked, "down_proj")
        if self.gate is not None:
            h_RF = gate_up(hidden_TD, up, slots_E, order, gate=self.gate, settings=settings.gate_up)
        else:
            token_R = order.pairs_R.clamp(min=0) // order.rows_TK.shape[1]
            x_RD = hidden_TD.index_select(0, token_R)
            h_RF = math.apply_gate(down(x_RD, up, slots_E, order, settings=settings.gate_up))
        y_RD = down(h_RF, down_weights, slots_E, order, settings=settings.down)
        return y_RD if math.post_norm is None else math.post_norm(y_RD)

    def _weights(self, stacked: Mapping[str, torch.Tensor], name: str) -> SlotWeights:
        bias_SN = stacked.get(name + "_bias")
        if name in self.stored:
            return self.stored[name].of(stacked, bias_SN)
        values = stacked[name].mT if self.math.is_transposed else stacked[name]
        return SlotWeights(values=values, bias=bias_SN)


class GroupedRows:
    """Rows of a layer in blocks of one expert each, computed block by block as experts arrive."""

    def __init__(
        self,
        experts: GroupedExperts,
        hidden_TD: torch.Tensor,
        top_k_index_TK: torch.Tensor,
        top_k_weights_TK: torch.Tensor,
        stacked: Mapping[str, torch.Tensor],
    ) -> None:
        self._experts = experts
        self._inputs = hidden_TD, top_k_index_TK, top_k_weights_TK
        self._stacked = stacked
        self._settings = experts.settings(hidden_TD, top_k_index_TK)
        self._block_rows = self._settings.block_rows
        num_blocks = max_blocks(top_k_index_TK.numel(), experts.num_experts, self._block_rows)
        self.output_RD = hidden_TD.new_empty(num_blocks * self._block_rows, hidden_TD.shape[1])
        self._slots_E = torch.empty(experts.num_experts, dtype=torch.int32, device=hidden_TD.device)
        self._counts: Sequence[int] = ()
        self._first_blocks: list[int] = []
        self._order: SortedPairs | None = None  # once the stream has come to it

    def sort(self, compute: Stream) -> None:
        """Queue the sort of the rows."""

        def sort() -> None:
            self._order = self._experts.sort(self._inputs[1], self._settings)

        compute.launch(sort)

    def place(self, counts: Sequence[int], slots: Mapping[int, int], compute: Stream) -> None:
        """Expert e has `counts[e]` rows and, if the device computes it, is in `slots[e]`."""
        self._counts = counts
        num_blocks = (-(-count // self._block_rows) for count in counts)
        self._first_blocks = list(itertools.accumulate(num_blocks, initial=0))
        table = [slots.get(expert, -1) for expert in range(len(counts))]
        compute.copy_async(self._slots_E, torch.tensor(table, dtype=torch.int32))

    def rows_of(self, expert: int) -> slice:
        """Its rows of `output_RD`, without padding."""
        first = self._first_blocks[expert] * self._block_rows
        return slice(first, first + self._counts[expert])

    def tokens_of(self, expert: int, index_TK: torch.Tensor) -> torch.Tensor:
        """The tokens of its rows, by the routing on the host."""
        return (index_TK == expert).nonzero()[:, 0]

    def compute(self, experts: Sequence[int], compute: Stream) -> None:
        """Queue the products of `experts`, all of them together."""
        first = self._first_blocks
        blocks = [block for e in experts for block in range(first[e], first[e + 1])]
        if not blocks:
            return
        if blocks == list(range(blocks[0], blocks[-1] + 1)):  # in one run: views, nothing moves
            chosen = slice(blocks[0], blocks[-1] + 1)
            compute.launch(lambda: self._compute(chosen))
            return
        chosen_B = torch.empty(len(blocks), dtype=torch.int64, device=self.output_RD.device)
        compute.copy_async(chosen_B, torch.tensor(blocks))
        compute.launch(lambda: self._compute(chosen_B))

    def combine(self, total_TD: torch.Tensor, compute: Stream) -> None:
        """Queue the weighted sum of each token's rows."""
        compute.launch(lambda: self._combine(total_TD))

    def _compute(self, blocks: slice | torch.Tensor) -> None:
        order, block_rows = self._order, self._block_rows
        assert order is not None
        block_experts_B = order.block_experts_B[blocks]
        part = SortedPairs(
            pairs_R=order.pairs_R.view(-1, block_rows)[blocks].flatten(),
            rows_TK=order.rows_TK,
            block_experts_B=block_experts_B,
            counts_E=order.counts_E,
            block_rows=block_rows,
        )
        y_RD = self._experts.products(
            self._inputs[0], part, self._stacked, self._slots_E, self._settings
        )
        shape = (-1, block_rows, y_RD.shape[1])
        self.output_RD.view(shape)[blocks] = y_RD.view(shape)

    def _combine(self, total_TD: torch.Tensor) -> None:
        assert self._order is not None
        total_TD.copy_(combine(self.output_RD, self._order.rows_TK, self._inputs[2]))


@lru_cache(maxsize=1024)
def _settings(
    gpu_name: str | None,
    num_pairs: int,
    num_experts: int,
    model_dim: int,
    ffn_dim: int,
    value_bytes: int,
) -> LayerSettings:
    """Looked up once for each number of pairs: a layer takes some microseconds."""
    find = KernelSettings.untuned().find if gpu_name is None else partial(layer_settings, gpu_name)
    found = find(
        num_pairs=num_pairs,
        num_experts=num_experts,
        model_dim=model_dim,
        ffn_dim=ffn_dim,
        value_bytes=value_bytes,
    )
    assert found is not None, value_bytes  # the untuned ones hold every number of rows
    return found
