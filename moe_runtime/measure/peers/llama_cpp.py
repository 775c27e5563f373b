"""llama.cpp with the same weights as GGUF, mapped into memory."""

import ctypes
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from moe_runtime.measure.bench.job import Job
from moe_runtime.measure.processor import this_processor

_QUIET = llama_cpp.llama_log_callback(lambda level, text, data: None)


class LlamaCpp:
    """The C interface of llama-cpp-python; memory-mapped weights, so the cap makes pages leave."""

    def __init__(self, job: Job) -> None:
        assert job.gguf is not None
        llama_cpp.llama_log_set(_QUIET, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        settings.use_mmap = True
        settings.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(job.gguf).encode(), settings)
        if not self._model:
            raise ValueError(f"llama.cpp cannot load {job.gguf}")
        threads = this_processor().physical_cores
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = job.context_tokens
        context.n_threads = context.n_threads_batch = threads
        context.no_perf = True
        self._context = llama_cpp.llama_init_from_model(self._model, context)
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self._token = (llama_cpp.llama_token * 1)()
        description = ctypes.create_string_buffer(128)
        llama_cpp.llama_model_desc(self._model, description, len(description))
        self.facts = {"threads": threads, "weights": description.value.decode()}

    def start(self, variant: str, first_row: int) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def step(self, token: int) -> None:
        self._token[0] = token
        batch = llama_cpp.llama_batch_get_one(self._token, 1)
        if llama_cpp.llama_decode(self._context, batch) != 0:
            raise RuntimeError(f"llama.cpp failed to decode token {token}")
        llama_cpp.llama_synchronize(self._context)

    def logits(self) -> npt.NDArray[np.float32]:
        pointer = llama_cpp.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(pointer, shape=(self._vocab_size,)).copy()

    def counters(self) -> dict[str, int]:
        return {}


def load(job: Job) -> tuple[LlamaCpp, dict[str, Any]]:
    """A mapped model and what it says of itself."""
    peer = LlamaCpp(job)
    return peer, peer.facts
