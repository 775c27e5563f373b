"""Forced decode steps of a model under PyTorch's profiler, for one batch size after another."""

import json
import random
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from moe_runtime.config import write_whole
from moe_runtime.integrations.transformers.handle import Handle, handle
from moe_runtime.integrations.transformers.progress import quiet_transformers
from moe_runtime.integrations.transformers.resolve import ResolvedModel, resolve_model
from moe_runtime.measure.forced_steps import ForcedSteps, token_rows
from moe_runtime.measure.generation_request import GenerationRequest, load_requested
from moe_runtime.measure.launch_times import tklqt_seconds, transition_batch
from moe_runtime.measure.profiler_events import RANGE, of_category, read_events
from moe_runtime.measure.prompt import read_prompts
from moe_runtime.measure.step_parts import NamedParts
from moe_runtime.measure.step_profile import CLOCK, STEP, StepProfile, clock_offset, step_profile
from moe_runtime.measure.trace_lanes import with_lanes
from moe_runtime.recording.run_record import RunRecord

_WARM_UP_STEPS = 3
_MOST_SPANS = 1_000_000  # of a few steps, so that none is left out
_RANDOM_TOKENS = 4096
_FIRST = "first range"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileRequest:
    """What to run. `loading` says which model and how; its prompts are the text that is forced.

    Without prompts tokens are random, which spreads over experts more evenly than text does.
    `trace` is the file for the trace of the first of `batches`.
    """

    loading: GenerationRequest
    batches: Sequence[int]
    prompt_tokens: int
    num_steps: int
    trace: Path | None = None


class ProfileListener(Protocol):
    """Hears what happens while it happens."""

    def on_loading(self, done: int, total: int) -> None:
        """So many tensors of the dense weights are loaded."""

    def on_loaded(self, placement: str) -> None:
        """The model is ready; `placement` says in one line what lives where."""

    def on_batch(self, done: int, total: int) -> None:
        """So many batch sizes are finished."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchProfile:
    """One batch size. `step_seconds` is the median without the profiler, `steps` are under it."""

    batch: int
    step_seconds: float
    steps: StepProfile
    hits: int
    misses: int
    bytes_read: int

    @property
    def tklqt_seconds(self) -> float | None:
        """Of one step; None where no kernel was launched on a GPU."""
        if not self.steps.kernels:
            return None
        return tklqt_seconds(self.steps.kernels) / self.steps.num_steps

    def as_dict(self) -> dict[str, Any]:
        """Seconds of one step, operators and kernels by the time they took themselves."""
        steps = self.steps
        num = steps.num_steps
        return {
            "batch": self.batch,
            "step_seconds": self.step_seconds,
            "profiled_step_seconds": steps.seconds / num,
            "tokens_per_second": self.batch / self.step_seconds,
            "parts": [
                {
                    "part": part,
                    "seconds": seconds / num,
                    "share": seconds / steps.seconds,
                    "device_seconds": steps.device_seconds.get(part, 0.0) / num,
                }
                for part, seconds in sorted(steps.part_seconds.items(), key=lambda p: -p[1])
            ],
            "operators": [
                {"name": name, "calls": found.num / num, "seconds": found.seconds / num}
                for name, found in steps.operators.items()
            ],
            "kernels": [
                {
                    "name": kernel.name,
                    "launches": kernel.num / num,
                    "seconds": kernel.seconds / num,
                    "launch_and_queue_seconds": kernel.queue_seconds / num,
                }
                for kernel in steps.kernels
            ],
            "tklqt_seconds": self.tklqt_seconds,
            "hits": self.hits,
            "misses": self.misses,
            "bytes_read": self.bytes_read,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What came out of a request. `settings` are those of the model's report."""

    request: ProfileRequest
    batches: Sequence[BatchProfile]
    settings: Mapping[str, Any]

    @property
    def transition_batch(self) -> int | None:
        """From which batch size on kernels queue on the device; None where it is not seen."""
        found = {each.batch: each.tklqt_seconds for each in self.batches}
        known = {batch: seconds for batch, seconds in found.items() if seconds is not None}
        return transition_batch(known)

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        request = self.request
        loading = asdict(request.loading)
        for name in ("decoding", "prompts", "report", "hardware", "check", "chat"):
            del loading[name]
        return {
            "batches": [each.as_dict() for each in self.batches],
            "transition_batch": self.transition_batch,
            "prompt_tokens": request.prompt_tokens,
            "steps": request.num_steps,
            "tokens": "text" if request.loading.prompts else "random",
            "trace": None if request.trace is None else str(request.trace),
            "settings": loading | dict(self.settings),
        }


def profile(request: ProfileRequest, listener: ProfileListener) -> Profile:
    """Load the model and profile each batch size. However this ends, the model is closed."""
    loading = request.loading
    resolved = resolve_model(
        loading.model, revision=loading.revision, trust_remote_code=loading.trust_remote_code
    )
    token_ids = _token_ids(request, resolved)
    with quiet_transformers(listener.on_loading):
        model = load_requested(loading, resolved)
    with closing(handle(model)) as owner:
        listener.on_loaded(owner.placement())
        batches = []
        for done, batch in enumerate(request.batches):
            listener.on_batch(done, len(request.batches))
            trace = request.trace if done == 0 else None
            batches.append(_profile_batch(request, model, owner, token_ids, batch, trace))
        listener.on_batch(len(batches), len(batches))
        settings = owner.report()["settings"]
    return Profile(request=request, batches=batches, settings=settings)


def _token_ids(request: ProfileRequest, resolved: ResolvedModel) -> list[int]:
    loading = request.loading
    config = resolved.config.get_text_config()
    needed = request.prompt_tokens + _WARM_UP_STEPS + 2 * request.num_steps
    context = getattr(config, "max_position_embeddings", None)
    if isinstance(context, int) and needed > context:
        raise ValueError(
            f"{request.prompt_tokens} tokens before, and {needed - request.prompt_tokens} for "
            f"{request.num_steps} steps with and without the profiler, are more than the model's "
            f"context of {context}; lower --prompt-tokens or --steps"
        )
    if not loading.prompts:
        generator = random.Random(0)
        return [generator.randrange(config.vocab_size) for _ in range(_RANDOM_TOKENS)]
    _, prompts = read_prompts(
        resolved.folder,
        resolved.config,
        loading.prompts,
        max_new_tokens=1,
        chat=False,
        trust_remote_code=loading.trust_remote_code,
    )
    return [token for prompt in prompts for token in prompt.token_ids]


def _profile_batch(
    request: ProfileRequest,
    model: PreTrainedModel,
    owner: Handle,
    token_ids: Sequence[int],
    batch: int,
    trace_file: Path | None,
) -> BatchProfile:
    num_steps = request.num_steps
    num_tokens = request.prompt_tokens + _WARM_UP_STEPS + 2 * num_steps
    rows_BS = token_rows(token_ids, num_sequences=batch, num_tokens=num_tokens)
    with torch.inference_mode():
        steps = ForcedSteps(model, rows_BS, request.prompt_tokens)
        steps.run(_WARM_UP_STEPS)
        before = owner.report()["cache"]
        seconds = statistics.median(steps.run(num_steps))
        after = owner.report()["cache"]
        trace, record, clock_at = _profiled(model, owner, steps, num_steps)
    if trace_file is not None:
        ranges = of_category(read_events(trace), RANGE)
        _write_trace(with_lanes(trace, record, clock_offset(ranges, clock_at)), trace_file)
    return BatchProfile(
        batch=batch,
        step_seconds=seconds,
        steps=step_profile(trace, record, clock_at),
        **{name: after[name] - before[name] for name in ("hits", "misses", "bytes_read")},
    )


def _profiled(
    model: PreTrainedModel, owner: Handle, steps: ForcedSteps, num_steps: int
) -> tuple[dict[str, Any], RunRecord, float]:
    """The Chrome trace, what was recorded meanwhile, and time.perf_counter() in its CLOCK."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if model.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with (
        NamedParts(model),
        owner.recorder(num_spans=_MOST_SPANS) as recorder,
        torch.profiler.profile(activities=activities) as seen,
    ):
        with torch.profiler.record_function(_FIRST):
            pass  # the first range takes longer, and the clock is as right as its range is short
        with torch.profiler.record_function(CLOCK):
            clock_at = time.perf_counter()
        steps.run(num_steps, partial(torch.profiler.record_function, STEP))
    with tempfile.TemporaryDirectory(prefix="moe-runtime-profile-") as folder:
        exported = Path(folder, "trace.json")
        seen.export_chrome_trace(str(exported))
        trace: dict[str, Any] = json.loads(exported.read_text(encoding="utf-8"))
    return trace, recorder.record(), clock_at


def _write_trace(trace: Mapping[str, Any], path: Path) -> None:
    try:
        write_whole(path, json.dumps(trace))
    except OSError as error:
        raise OSError(
            error.errno, f"trace {path} cannot be written: {error.strerror}; free space there"
        ) from error
