"""A model that keeps its own attention and cache: sequences that start together run together."""

import inspect
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from moe_runtime.integrations.transformers.kv_rows import row_bytes, select_rows
from moe_runtime.kernels.cpu.attention_status import PAGE_TOKENS
from moe_runtime.offline.pass_scheduler import PassPlan

# N sequences, S tokens a row, padding included


class OwnCacheModel:
    """Runs the passes of a `CohortScheduler`: prompts are padded on the left to one length."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._accepts = frozenset(inspect.signature(model.forward).parameters)
        self._cache: Any = None
        self._numbers: list[int] = []  # the sequence of each row
        self._mask_NS = torch.empty(0, 0, dtype=torch.long)

    @torch.no_grad()
    def page_bytes(self) -> int:
        """Bytes that a page's worth of tokens takes in the model's cache, states included."""
        self._start([[0] * PAGE_TOKENS], [0])
        taken = row_bytes(self._cache, 1)
        self._cache = None
        return max(1, taken)

    @torch.no_grad()
    def run(self, plan: PassPlan) -> torch.Tensor:
        """Logits `[sequences, vocabulary]` behind the last token of each of `plan.sequences`."""
        numbers = [one.number for one in plan.sequences]
        if plan.prompts:
            return self._start([one.token_ids for one in plan.prompts], numbers)
        if numbers != self._numbers:
            rows = [self._numbers.index(number) for number in numbers]
            select_rows(self._cache, len(self._numbers), rows)
            self._mask_NS = self._mask_NS[rows]
            self._numbers = numbers
        self._mask_NS = torch.cat([self._mask_NS, torch.ones_like(self._mask_NS[:, :1])], 1)
        return self._forward(torch.tensor([[one.written[-1]] for one in plan.decoding]))

    def _start(self, prompts: list[list[int]], numbers: list[int]) -> torch.Tensor:
        length = max(map(len, prompts))
        ids_NS = torch.zeros(len(prompts), length, dtype=torch.long)
        self._mask_NS = torch.zeros_like(ids_NS)
        for row, ids in enumerate(prompts):
            ids_NS[row, length - len(ids) :] = torch.tensor(ids)
            self._mask_NS[row, length - len(ids) :] = 1
        self._cache = DynamicCache(config=self._model.config)
        self._numbers = numbers
        return self._forward(ids_NS)

    def _forward(self, ids_NS: torch.Tensor) -> torch.Tensor:
        positions_NS = (self._mask_NS.cumsum(1) - 1).clamp(min=0)[:, -ids_NS.shape[1] :]
        optional = {"position_ids": positions_NS, "logits_to_keep": 1}
        output = self._model(
            input_ids=ids_NS,
            attention_mask=self._mask_NS,
            past_key_values=self._cache,
            use_cache=True,
            **{name: value for name, value in optional.items() if name in self._accepts},
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits
