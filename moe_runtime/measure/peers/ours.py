"""moe_runtime itself, as a contestant."""

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from moe_runtime.integrations.transformers.handle import Handle, handle
from moe_runtime.integrations.transformers.load import load
from moe_runtime.integrations.transformers.progress import quiet_transformers
from moe_runtime.measure.bench.job import Job
from moe_runtime.measure.peers.decoder import Decoder

# What a process takes beyond dense weights and slots: buffers of torch and of the loader,
# activations, the KV cache. On OLMoE shapes 32 MiB survive the cap and 24 do not.
BUFFER_BYTES = 64 * 2**20


class Ours:
    """Slots fill what the memory leaves beside dense weights and `BUFFER_BYTES`."""

    _handle: Handle
    _decoder: Decoder

    def load(self, job: Job) -> dict[str, Any]:
        limits: dict[int | str, int | str] | None = None
        if job.memory_bytes is not None:
            limits = {"cpu": max(0, job.memory_bytes - BUFFER_BYTES)}
        with quiet_transformers(lambda done, total: None), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few slots are the point
            model = load(
                job.checkpoint,
                expert_memory=1.0,
                max_memory=limits,
                policy=job.policy,
                dtype=getattr(torch, job.dtype),
            )
        self._handle = handle(model)
        self._decoder = Decoder(model, job)
        if self._handle.budget.holds_all:
            self._read_all_experts()
        report = self._handle.report()
        return {
            "slots": report["cache"]["slots"],
            "slot_bytes": report["cache"]["slot_bytes"],
            "policy": report["cache"]["policy"],
            "experts": report["settings"]["experts"],
            "direct_reads": report["settings"]["direct_reads"],
        }

    def start(self, variant: str, first_row: int) -> None:
        self._decoder.start(first_row)

    def step(self, token: int) -> None:
        self._decoder.step(token)

    def logits(self) -> npt.NDArray[np.float32]:
        return self._decoder.logits()

    def counters(self) -> dict[str, int]:
        cache = self._handle.report()["cache"]
        return {name: cache[name] for name in ("hits", "misses", "bytes_read")}

    def _read_all_experts(self) -> None:
        """A resident model has read everything before its first token."""
        engine = self._handle.engine
        for layer, experts in enumerate(engine.tensor_map.layers):
            with engine.open_layer(layer, range(experts.num_experts)) as access:
                for expert in range(experts.num_experts):
                    access.weights(expert)
                    access.release(expert)


PEER = Ours
