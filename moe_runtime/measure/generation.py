"""Prompts run through a model with offloaded experts, with everything measured on the way."""

import gc
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
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
from moe_runtime.integrations.transformers.resolve import ResolvedModel, resolve_model
from moe_runtime.measure.bench.machine import describe_machine, describe_versions, git_commit
from moe_runtime.measure.completion import Completion, complete
from moe_runtime.measure.decoding import Decoding
from moe_runtime.measure.fast_parity import MIN_POSITIONS
from moe_runtime.measure.forced import ForcedLogits, forced_logits
from moe_runtime.measure.parity import Parity, Reference, check_fast_parity, check_parity
from moe_runtime.measure.planned_load import OFF, load
from moe_runtime.measure.process_memory import peak_resident_bytes, resident_bytes
from moe_runtime.measure.prompt import Prompt, read_prompts
from moe_runtime.measure.run_prediction import RunPrediction, predict_run
from moe_runtime.memory.packed_folder import is_packed
from moe_runtime.memory.unpack_folder import unpack_folder
from moe_runtime.perf.hardware import Hardware
from moe_runtime.perf.step_cost import StepCost
from moe_runtime.recording.run_record import RunRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """What to run, and in how much memory; the arguments of `load()` mean what they mean there.

    With `report`, the file of a page, the run is recorded; with `hardware`, a file of rates, what
    it should have taken is predicted, too.
    """

    model: str
    prompts: Sequence[str]
    decoding: Decoding
    expert_memory: str = "auto"
    host_memory: str = "auto"
    miss: str = "auto"
    policy: str = "lru"
    predictor: str = "off"
    warm_start: bool = True
    expert_slots: str = "auto"
    expert_dtype: str = "auto"
    page_cache: bool = False
    exact: bool = False
    linears: bool = False
    max_memory: Mapping[int | str, int | str] | None = None
    dtype: str = "auto"
    device: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    chat: bool = False
    check: bool = False
    placement: str | None = None
    dispatch: str | None = None
    payload: str = "exact"
    pipeline: int | str = 1
    attention: str | None = None
    tables: str | None = None
    timeout_seconds: float | None = None
    plan: str = OFF
    explicit: tuple[str, ...] = ()  # fields that were given and that a plan must leave as they are
    report: str | None = None
    hardware: str | None = None

    @property
    def is_parallel(self) -> bool:
        """Whether ranks are to share the experts."""
        options = (self.placement, self.dispatch, self.attention, self.tables)
        return any(option is not None for option in options)


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
        with closing(handle(model)) as owner:
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
            if request.check and not request.exact and report["settings"]["dtype"] != "float32":
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
            parity = _check(request, resolved, tokenizer, completions, forced, report)
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


def load_requested(request: GenerationRequest, resolved: ResolvedModel) -> PreTrainedModel:
    """The model as the request wants it."""
    arguments = {
        "expert_memory": request.expert_memory,
        "host_memory": request.host_memory,
        "miss": request.miss,
        "policy": request.policy,
        "predictor": request.predictor,
        "warm_start": request.warm_start,
        "expert_slots": request.expert_slots,
        "expert_dtype": request.expert_dtype,
        "page_cache": request.page_cache,
        "exact": request.exact,
        "linears": request.linears,
        "max_memory": request.max_memory,
        "device_map": request.device,
        "placement": request.placement,
        "dispatch": request.dispatch,
        "attention": request.attention,
        "tables": request.tables,
        "payload": request.payload,
        "pipeline": request.pipeline,
        "timeout_seconds": request.timeout_seconds,
        "trust_remote_code": request.trust_remote_code,
        "dtype": request.dtype,
    }
    if request.plan != OFF:
        names = {"device_map" if name == "device" else name for name in request.explicit}
        arguments = {name: value for name, value in arguments.items() if name in names}
    return load(resolved.folder, plan=request.plan, **arguments)


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


def _check(
    request: GenerationRequest,
    resolved: ResolvedModel,
    tokenizer: PreTrainedTokenizerBase,
    completions: Sequence[Completion],
    forced: Sequence[ForcedLogits],
    report: Mapping[str, Any],
) -> Parity:
    with _reference_folder(resolved.folder) as folder:
        reference = Reference(
            folder=folder,
            dtype=request.dtype,
            effective_dtype=report["settings"]["dtype"],
            device=report["settings"]["device"],
            trust_remote_code=request.trust_remote_code,
            quantisation=resolved.quantisation,
        )
        if request.exact:
            return check_parity(completions, request.decoding, reference)
        is_greedy = request.decoding.temperature == 0 and not request.decoding.stop
        if reference.effective_dtype != "float32" or not is_greedy:
            completions = _greedy_in_float32(request, resolved, tokenizer, completions, report)
        return check_fast_parity(completions, forced, reference, expert_dtype=request.expert_dtype)


@contextmanager
def _reference_folder(folder: Path) -> Iterator[Path]:
    """What unmodified transformers can read: a packed model is restored, for as long as needed."""
    if not is_packed(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="moe-runtime-unpacked-") as restored:
        yield unpack_folder(folder, Path(restored, folder.name)).folder


def _greedy_in_float32(
    request: GenerationRequest,
    resolved: ResolvedModel,
    tokenizer: PreTrainedTokenizerBase,
    completions: Sequence[Completion],
    report: Mapping[str, Any],
) -> list[Completion]:
    """The same prompts through at least the same number of slots, with twice the bytes."""
    memory = report["memory"]
    wide = replace(
        request,
        dtype="float32",
        expert_memory=str(
            2 * max(memory["expert_used_bytes"], report["cache"]["slots"] * memory["expert_bytes"])
        ),
        expert_slots="auto",
        expert_dtype="auto",  # rounds bfloat16 weights alone; the logits below are judged with it
        max_memory=None,
        plan=OFF,
        predictor="off",
        warm_start=False,
        check=False,
    )
    decoding = Decoding(max_new_tokens=request.decoding.max_new_tokens)
    with quiet_transformers(lambda done, total: None):
        model = load_requested(wide, resolved)
        with closing(handle(model)):
            return [complete(model, tokenizer, one.prompt, decoding) for one in completions]
