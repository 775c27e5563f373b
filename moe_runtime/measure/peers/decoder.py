"""Forced decoding with a transformers model, whoever holds its experts."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from transformers import DynamicCache, PreTrainedModel

from moe_runtime.measure.bench.job import Job
from moe_runtime.measure.replay_routing import RoutingReplay
from moe_runtime.trace import Trace


class Decoder:
    """One sequence of one-token steps, with the router's choice or a replayed one: a Peer.

    `choose` hears the variant before each sequence; `count` gives the counters.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        job: Job,
        *,
        choose: Callable[[str], object] = lambda variant: None,
        count: Callable[[], dict[str, int]] = dict,
    ) -> None:
        self._model = model
        self._device = torch.device(job.device)
        self._choose = choose
        self._count = count
        self._replay = None
        if job.replay is not None:
            self._replay = RoutingReplay(model, Trace.load(job.replay))
        self._cache = DynamicCache()
        self._logits_V = torch.empty(0)

    def start(self, variant: str, first_row: int) -> None:
        self._choose(variant)
        self._cache = DynamicCache(config=self._model.config)
        if self._replay is not None:
            self._replay.seek(first_row)

    @torch.no_grad()
    def step(self, token: int) -> None:
        tokens = torch.tensor([[token]], device=self._device)
        output = self._model(tokens, past_key_values=self._cache, use_cache=True)
        self._logits_V = output.logits[0, -1]
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # sync: a step is over when its logits are there

    def logits(self) -> npt.NDArray[np.float32]:
        found: npt.NDArray[np.float32] = self._logits_V.float().cpu().numpy()
        return found

    def counters(self) -> dict[str, int]:
        return self._count()
