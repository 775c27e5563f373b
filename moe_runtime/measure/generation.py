"""Prompts run through a model with offloaded experts, with everything measured on the way."""

import gc
import statistics
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_runtime.errors import ParityError
from moe_runtime.integrations.transformers.handle import Handle, handle
from moe_runtime.integrations.transformers.install import make_policy
from moe_runtime.integrations.transformers.linears import are_sped_up
from moe_runtime.integrations.transformers.progress import quiet_transformers
from moe_runtime.integrations.transformers.resolve import resolve_model
from moe_runtime.measure.bench.machine import describe_machine, describe_versions, git_commit
from moe_runtime.measure.completion import Completion, complete
from moe_runtime.measure.fast_parity import MIN_POSITIONS
from moe_runtime.measure.forced import forced_logits
from moe_runtime.measure.generation_check import (
    compare_with_unmodified,
    greedy_in_float32,
    needs_float32,
    needs_forced_logits,
)
from moe_runtime.measure.generation_request import GenerationRequest, load_requested
from moe_runtime.measure.parity import Parity
from moe_runtime.measure.process_memory import peak_resident_bytes, resident_bytes
from moe_runtime.measure.prompt import Prompt, read_prompts
from moe_runtime.measure.run_prediction import RunPrediction, predict_run
from moe_runtime.measure.steady_collector import steady_collector
from moe_runtime.perf.hardware import Hardware
from moe_runtime.perf.step_cost import StepCost
from moe_runtime.recording.run_record import RunRecord


class Listener(Protocol):
    """Hears what happens while it happens."""

    def on_loading(self, done: int, total: int) -> None:
        """So many tensors of the dense weights are loaded."""

    def on_loaded(self, placement: str) -> None:
        """The model is ready; `placement` says in one line what lives where."""

    def on_prompt(self, prompt: Prompt) -> None:
        """`prompt` starts to run."""

    def on_text(self, text: str) -> None:
        """A piece of its continuation."""

    def on_completion(self, completion: Completion) -> None:
        """It is finished."""

    def on_check(self) -> None:
        """The unmodified model starts to run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidentMemory:
    """Resident bytes of this process: after imports, at most until loaded, and at most at all."""

    rss_after_imports_bytes: int
    load_peak_rss_bytes: int
    peak_rss_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What came out of a request. `parity` is None when not asked for, or when it failed to run.

    So is `record`; `prediction` also where nothing was decoded.
    """

    request: GenerationRequest
    completions: list[Completion]
    report: dict[str, Any]
    resident: ResidentMemory
    parity: Parity | None = None
    parity_error: ParityError | None = None
    record: RunRecord | None = None
    prediction: RunPrediction | None = None

    @property
    def num_tokens(self) -> int:
        """New tokens of all prompts."""
        return sum(len(completion.token_ids) for completion in self.completions)

    @property
    def decode_tokens_per_second(self) -> float | None:
        """First tokens, which wait for the prompt, are left out; None if there are no others."""
        num_decoded = self.num_tokens - len(self.completions)
        seconds = sum(completion.decode_seconds for completion in self.completions)
        return num_decoded / seconds if num_decoded and seconds else None

    @property
    def time_to_first_token_seconds(self) -> float:
        """The median over prompts."""
        return statistics.median(c.first_token_seconds for c in self.completions)

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        cache = dict(self.report["cache"])
        cache["bytes_read_per_token"] = cache["bytes_read"] / self.num_tokens
        found = {
            "results": [completion.as_dict() for completion in self.completions],
            "decode_tokens_per_second": self.decode_tokens_per_second,
            "time_to_first_token_seconds": self.time_to_first_token_seconds,
            "cache": cache,
            "prediction": self.report["prediction"],
            "tiers": self.report["tiers"],
            "plan": self.report["plan"],
            "memory": self.report["memory"] | asdict(self.resident),
            "settings": self.settings(),
        }
        if self.request.check:
            found["parity"] = self.parity.as_dict() if self.parity else None
        return found

    def settings(self) -> dict[str, Any]:
        """What was asked for, and what of it is in use."""
        request = asdict(self.request)
        del request["prompts"], request["explicit"]
        decoding = request.pop("decoding")
        versions = {name: version(name) for name in ("torch", "transformers")}
        settings: dict[str, Any] = request | decoding
        # The report last: it has the dtype and device in use, not as they were asked for.
        settings |= self.report["settings"]
        return settings | {"versions": versions}

    def environment(self) -> dict[str, Any]:
        """The machine and the versions that it ran on."""
        folder = Path(self.request.model)
        found = describe_machine(
            folder if folder.is_dir() else Path.cwd(),
            torch.device(self.report["settings"]["device"]),
        )
        return found | {"versions": describe_versions(), "commit": git_commit()}

    def require_parity(self) -> None:
        """Raise ParityError if a check was asked for and did not end well."""
        if self.parity_error is not None:
            raise self.parity_error
        if self.parity is not None:
            self.parity.require()


def run_generation(request: GenerationRequest, listener: Listener) -> Generation:
    """Load the model, run the prompts one after the other, release it, and check if asked to.

    Bad prompts are refused before any weight is read. However this ends, files and threads of the
    model are closed.
    """
    after_imports = resident_bytes()
    hardware = None if request.hardware is None else Hardware.load(Path(request.hardware))
    resolved = resolve_model(
        request.model, revision=request.revision, trust_remote_code=request.trust_remote_code
    )
    record, prediction = None, None
    with quiet_transformers(listener.on_loading):
        tokenizer, prompts = read_prompts(
            resolved.folder,
            resolved.config,
            request.prompts,
            max_new_tokens=request.decoding.max_new_tokens,
            chat=request.chat,
            trust_remote_code=request.trust_remote_code,
        )
        model = load_requested(request, resolved)
        load_peak = peak_resident_bytes()
        with closing(handle(model)) as owner, steady_collector():
            listener.on_loaded(owner.placement())
            with ExitStack() as recording:
                if request.report is not None:
                    recorder = recording.enter_context(owner.recorder())
                completions = _complete_all(request, model, tokenizer, prompts, listener)
            report = owner.report()
            if request.report is not None:
                record = recorder.record()
                if hardware is not None:
                    prediction = _predict(record, hardware, owner, model)
            forced = []
            if needs_forced_logits(request, report):
                listener.on_check()
                forced = forced_logits(model, completions, min_positions=MIN_POSITIONS)
    resident = ResidentMemory(
        rss_after_imports_bytes=after_imports,
        load_peak_rss_bytes=load_peak,
        peak_rss_bytes=peak_resident_bytes(),
    )
    del model, owner
    gc.collect()  # the unmodified model needs the memory
    parity, parity_error = None, None
    if request.check:
        listener.on_check()
        try:
            greedy = completions
            if needs_float32(request, report):
                greedy = greedy_in_float32(request, resolved, tokenizer, completions, report)
            parity = compare_with_unmodified(request, resolved, greedy, forced, report)
        except ParityError as error:  # what was generated is not lost with it
            parity_error = error
    return Generation(
        request=request,
        completions=completions,
        report=report,
        resident=resident,
        parity=parity,
        parity_error=parity_error,
        record=record,
        prediction=prediction,
    )


def _predict(
    record: RunRecord, hardware: Hardware, owner: Handle, model: PreTrainedModel
) -> RunPrediction | None:
    memory = owner.report()["memory"]
    return predict_run(
        record.first,
        lambda: make_policy(owner.settings.policy, owner.engine.tensor_map),
        owner.budget.num_slots,
        StepCost.of(
            hardware,
            expert_bytes=memory["expert_bytes"],
            # A token looks one row up in what is mapped.
            dense_bytes=(memory["dense_bytes"] - memory["mapped_bytes"]) // len(owner.sites),
            uses_kernel=are_sped_up(model),
        ),
    )


def _complete_all(
    request: GenerationRequest,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    listener: Listener,
) -> list[Completion]:
    completions = []
    for prompt in prompts:
        listener.on_prompt(prompt)
        completion = complete(
            model,
            tokenizer,
            prompt,
            request.decoding,
            on_text=listener.on_text,
            keep_logits=request.check,
        )
        listener.on_completion(completion)
        completions.append(completion)
    return completions
