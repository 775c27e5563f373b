"""Unmodified transformers with all experts in memory: also the reference of every gate."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_runtime.integrations.transformers.progress import quiet_transformers
from moe_runtime.measure.bench.job import Job
from moe_runtime.measure.peers.decoder import Decoder

NO_EXPERTS = "no_experts"


class TransformersResident:
    """Its variants are experts implementations of transformers, and one that computes nothing."""

    _model: PreTrainedModel
    _decoder: Decoder

    def load(self, job: Job) -> dict[str, Any]:
        ALL_EXPERTS_FUNCTIONS.register(NO_EXPERTS, _no_experts)
        with quiet_transformers(lambda done, total: None):
            self._model = AutoModelForCausalLM.from_pretrained(
                job.checkpoint,
                dtype=getattr(torch, job.dtype),
                experts_implementation="eager",
                local_files_only=True,
            )
        self._decoder = Decoder(self._model, job)
        return {}

    def start(self, variant: str, first_row: int) -> None:
        self._model.set_experts_implementation(variant)
        self._decoder.start(first_row)

    def step(self, token: int) -> None:
        self._decoder.step(token)

    def logits(self) -> npt.NDArray[np.float32]:
        return self._decoder.logits()

    def counters(self) -> dict[str, int]:
        return {}


def _no_experts(
    module: torch.nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    return torch.zeros_like(hidden_states)


PEER = TransformersResident
