"""Prompts run through a model whose experts are on disk, with their routing written to a trace."""

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_runtime.integrations.transformers.handle import handle
from moe_runtime.integrations.transformers.load import load
from moe_runtime.integrations.transformers.progress import quiet_transformers
from moe_runtime.integrations.transformers.resolve import resolve_model
from moe_runtime.measure.decoding import Decoding
from moe_runtime.measure.prompt import Prompt, read_prompts
from moe_runtime.measure.routing_recorder import RoutingRecorder
from moe_runtime.memory.checkpoint_digest import checkpoint_digest
from moe_runtime.trace_writer import TraceWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordingRequest:
    """What to run, and where to write; the arguments of `load()` mean what they mean there.

    `domains` labels the prompts, one each. Prompts run `batch_size` at a time, in order.
    """

    model: str
    prompts: Sequence[str]
    domains: Sequence[str]
    output: Path
    decoding: Decoding
    batch_size: int = 1
    hidden: bool = False
    expert_memory: str = "auto"
    policy: str = "lru"
    dtype: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    chat: bool = False


class RecordingListener(Protocol):
    """Hears what happens while it happens."""

    def on_loading(self, done: int, total: int) -> None:
        """So many tensors of the dense weights are loaded."""

    def on_loaded(self, placement: str) -> None:
        """The model is ready; `placement` says in one line what lives where."""

    def on_prompts(self, done: int, total: int) -> None:
        """So many prompts are finished."""

    def on_cut_short(self, kept: Path, num_tokens: int) -> None:
        """An error or an interrupt ends the recording; what there is of it will be in `kept`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """What came out of a request. `cache` is that of the model's report."""

    output: Path
    model: str
    num_prompts: int
    num_rows: int  # tokens that went through the model, padding included
    seconds: float  # of running prompts, loading and compressing left out
    cache: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "output": str(self.output),
            "model": self.model,
            "prompts": self.num_prompts,
            "rows": self.num_rows,
            "seconds": self.seconds,
            "bytes": self.output.stat().st_size,
            "cache": self.cache,
        }


def record_trace(request: RecordingRequest, listener: RecordingListener) -> Recording:
    """Load the model, run the prompts, and write the trace.

    Bad prompts are refused before any weight is read. However this ends, files and threads of the
    model are closed.
    """
    resolved = resolve_model(
        request.model, revision=request.revision, trust_remote_code=request.trust_remote_code
    )
    with quiet_transformers(listener.on_loading):
        tokenizer, prompts = read_prompts(
            resolved.folder,
            resolved.config,
            request.prompts,
            max_new_tokens=request.decoding.max_new_tokens,
            chat=request.chat,
            trust_remote_code=request.trust_remote_code,
        )
        model = load(
            resolved.folder,
            expert_memory=request.expert_memory,
            policy=request.policy,
            warm_start=False,
            trust_remote_code=request.trust_remote_code,
            dtype=request.dtype,
        )
        with closing(handle(model)) as owner:
            listener.on_loaded(owner.placement())
            # The folder's name, not its place: a trace may be read on another machine.
            path = Path(request.model)
            name = path.resolve().name if path.is_dir() else request.model
            # A packed checkpoint has other bytes than its original.
            is_packed = owner.settings.packed_on_disk
            checkpoint = "" if is_packed else checkpoint_digest(resolved.folder)
            with TraceWriter(request.output) as writer:
                started = time.perf_counter()
                recorder = RoutingRecorder(
                    model,
                    writer,
                    name=name,
                    checkpoint=checkpoint,
                    hidden=request.hidden,
                    end_token_ids=_end_token_ids(model),
                )
                _run(request, model, tokenizer, prompts, recorder, writer, listener)
                seconds = time.perf_counter() - started
            return Recording(
                output=request.output,
                model=name,
                num_prompts=len(prompts),
                num_rows=writer.num_tokens,
                seconds=seconds,
                cache=owner.report()["cache"],
            )


def _run(
    request: RecordingRequest,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    recorder: RoutingRecorder,
    writer: TraceWriter,
    listener: RecordingListener,
) -> None:
    try:
        with recorder:
            for start in range(0, len(prompts), request.batch_size):
                listener.on_prompts(start, len(prompts))
                batch = prompts[start : start + request.batch_size]
                recorder.domains = [request.domains[prompt.index] for prompt in batch]
                _generate(model, tokenizer, batch, request.decoding)
            listener.on_prompts(len(prompts), len(prompts))
    except BaseException:
        if writer.num_tokens:
            listener.on_cut_short(writer.partial_path, writer.num_tokens)
        raise


def _end_token_ids(model: PreTrainedModel) -> list[int]:
    ends = model.generation_config.eos_token_id
    return [] if ends is None else ends if isinstance(ends, list) else [ends]


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[Prompt],
    decoding: Decoding,
) -> None:
    """Run `batch` as one, its shorter prompts padded on the left."""
    longest = max(len(prompt.token_ids) for prompt in batch)
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    pad = next(token for token in known if token is not None)
    rows = [[pad] * (longest - len(p.token_ids)) + p.token_ids for p in batch]
    seen = [[0] * (longest - len(p.token_ids)) + [1] * len(p.token_ids) for p in batch]
    torch.manual_seed(decoding.seed + batch[0].index)
    model.generate(  # type: ignore[operator]
        torch.tensor(rows, device=model.device),
        attention_mask=torch.tensor(seen, device=model.device),
        max_new_tokens=min(prompt.max_new_tokens for prompt in batch),
        pad_token_id=pad,
        **decoding.generate_arguments(),
    )
