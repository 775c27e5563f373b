"""Decode steps over tokens that were chosen before, whatever the model says."""

import inspect
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel

# B sequences, S tokens


def token_rows(token_ids: Sequence[int], *, num_sequences: int, num_tokens: int) -> torch.Tensor:
    """`[B, S]`: each sequence goes on where the one before it ends, and the end on to the start."""
    ids = torch.tensor(token_ids)
    places = torch.arange(num_sequences * num_tokens) % len(ids)
    return ids[places].view(num_sequences, num_tokens)


class ForcedSteps:
    """A model that has read the first tokens of `rows_BS`, and is given one more a step."""

    def __init__(self, model: PreTrainedModel, rows_BS: torch.Tensor, num_prompt: int) -> None:
        self._model: Any = model
        self._rows_BS = rows_BS.to(model.device)
        self._position = num_prompt
        arguments: dict[str, Any] = {"use_cache": True}
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            arguments["logits_to_keep"] = 1
        self._cache = self._model(self._rows_BS[:, :num_prompt], **arguments).past_key_values

    def run(
        self,
        num_steps: int,
        around: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> list[float]:
        """Seconds of each of the next steps, the device's work included."""
        seconds = []
        for _ in range(num_steps):
            column = slice(self._position, self._position + 1)
            self._position += 1
            began = time.perf_counter()
            with around():
                self._cache = self._model(
                    self._rows_BS[:, column], past_key_values=self._cache, use_cache=True
                ).past_key_values
                if self._rows_BS.is_cuda:
                    torch.cuda.synchronize(self._rows_BS.device)  # sync: the end of a step
            seconds.append(time.perf_counter() - began)
        return seconds
