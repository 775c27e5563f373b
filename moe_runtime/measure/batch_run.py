"""A batch file run through a model with offloaded experts, with everything measured on the way."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from moe_runtime.cache.scan import ScanPolicy
from moe_runtime.errors import BatchError, UnsupportedModelError
from moe_runtime.expert_memory import ExpertMemory
from moe_runtime.integrations.transformers.handle import Handle, handle
from moe_runtime.integrations.transformers.load import load
from moe_runtime.integrations.transformers.next_token import end_ids, unused_settings
from moe_runtime.integrations.transformers.own_cache_model import OwnCacheModel
from moe_runtime.integrations.transformers.paged_model import PagedModel
from moe_runtime.integrations.transformers.progress import quiet_transformers
from moe_runtime.integrations.transformers.resolve import ResolvedModel, resolve_model
from moe_runtime.integrations.transformers.streamed_forward import (
    StreamedForward,
    turn_listener,
    why_one_group,
)
from moe_runtime.measure.batch_lines import BatchLine, BatchLines, encode_line
from moe_runtime.measure.batch_pages import check_kv_memory, plan_pages
from moe_runtime.measure.batch_progress import BatchProgress
from moe_runtime.measure.batch_request import BatchRequest, BatchRun, Listener
from moe_runtime.measure.prompt import load_tokenizer
from moe_runtime.measure.steady_collector import steady_collector
from moe_runtime.memory.available import available_memory_bytes
from moe_runtime.offline.cohort_scheduler import CohortScheduler
from moe_runtime.offline.engine import Forward, OfflineEngine
from moe_runtime.offline.group_choice import GroupChoice
from moe_runtime.offline.group_model import GroupModel
from moe_runtime.offline.grouped_forward import GroupedForward
from moe_runtime.offline.kv_pages import page_bytes
from moe_runtime.offline.page_table import PageTable
from moe_runtime.offline.pass_scheduler import PassScheduler, Scheduler
from moe_runtime.offline.pass_size import PassSize
from moe_runtime.offline.request import BadLine, Request, read_requests
from moe_runtime.offline.result_file import ResultFile, failure, success
from moe_runtime.offline.sequence import Sequence

# Of what is free, left to all that is neither weights nor keys and values.
_RESERVE_SHARE = 0.1
# Of what is free, kept from experts where these would take all of it.
_KV_SHARE = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class _Passes:
    """What runs the passes, who runs in them, and what is known of them."""

    forward: Forward
    scheduler: Scheduler
    size: PassSize
    choice: GroupChoice
    kv: dict[str, Any]


def run_batch(request: BatchRequest, listener: Listener) -> BatchRun:
    """Run what earlier runs have not finished; each result is written when it is there."""
    if request.results.exists() and request.results.samefile(request.requests):
        raise BatchError(f"results file {request.results} is the requests file; name another")
    check_kv_memory(request.kv_memory)
    requests, bad_lines = read_requests(
        request.requests, max_tokens=request.max_tokens, temperature=request.temperature
    )
    with ResultFile(request.results) as results:
        failed = _Failures(results, listener)
        for bad in bad_lines:
            failed.add(bad)
        open_requests = [one for one in requests if not results.is_done(one)]
        run = _Run(request, results, failed, listener)
        if open_requests:
            run.run(open_requests)
        return BatchRun(
            num_lines=len(requests) + len(bad_lines),
            num_finished=run.num_finished,
            num_failed=failed.count,
            num_skipped=len(requests) - len(open_requests),
            prompt_tokens=run.prompt_tokens,
            new_tokens=run.new_tokens,
            seconds=run.seconds,
            load_seconds=run.load_seconds,
            report=run.report,
        )


class _Failures:
    """Lines that cannot run: each is written once, whatever the number of runs."""

    def __init__(self, results: ResultFile, listener: Listener) -> None:
        self.count = 0
        self._results = results
        self._listener = listener

    def add(self, bad: BadLine) -> None:
        self.count += 1
        if not self._results.is_reported(bad):
            self._results.append(failure(bad))
            self._listener.on_bad_line(bad)


class _Run:
    """One model and the lines that it runs."""

    def __init__(
        self, request: BatchRequest, results: ResultFile, failed: _Failures, listener: Listener
    ) -> None:
        self.num_finished = 0
        self.prompt_tokens = 0
        self.new_tokens = 0
        self.seconds = 0.0
        self.load_seconds = 0.0
        self.report: dict[str, Any] | None = None
        self._request = request
        self._results = results
        self._failed = failed
        self._listener = listener

    def run(self, requests: list[Request]) -> None:
        request = self._request
        resolved = resolve_model(
            request.model, revision=request.revision, trust_remote_code=request.trust_remote_code
        )
        with quiet_transformers(self._listener.on_loading):
            lines = self._encode(requests, resolved)
            if not lines.lines:
                return
            available_bytes = available_memory_bytes()
            started = time.perf_counter()
            policy = ScanPolicy()
            model = self._load(resolved, policy, available_bytes)
            with closing(handle(model)) as owner, steady_collector():
                self._listener.on_loaded(owner.placement())
                lines.end_ids = end_ids(model)
                if unused := unused_settings(model):
                    self._listener.on_warning(
                        f"generate() would heed {', '.join(unused)} of the model's generation "
                        "config, and batch does not"
                    )
                memory = owner.report()["memory"]
                free_bytes = int((1 - _RESERVE_SHARE) * available_bytes)
                free_bytes -= memory["dense_used_bytes"] + memory["expert_used_bytes"]
                with self._passes(model, owner, policy, lines, free_bytes) as passes:
                    self.load_seconds = time.perf_counter() - started
                    self._run(StreamedForward(passes.forward, owner, policy), passes, lines)

    def _load(
        self, resolved: ResolvedModel, policy: ScanPolicy, available_bytes: int
    ) -> PreTrainedModel:
        request = self._request
        limit: dict[int | str, int | str] | None = None
        if ExpertMemory.parse(request.expert_memory) == ExpertMemory():
            limit = {"cpu": int((1 - _KV_SHARE) * available_bytes)}
        loaded = load(
            resolved.folder,
            expert_memory=request.expert_memory,
            dense_memory=request.dense_memory,
            policy=policy,
            expert_dtype=request.expert_dtype,
            page_cache=request.page_cache,
            warm_start=False,
            max_memory=limit,
            device_map="cpu",
            trust_remote_code=request.trust_remote_code,
            dtype=request.dtype,
        )
        loaded.eval()
        return loaded

    def _encode(self, requests: list[Request], resolved: ResolvedModel) -> BatchLines:
        tokenizer = load_tokenizer(
            resolved.folder, trust_remote_code=self._request.trust_remote_code
        )
        lines = BatchLines(tokenizer=tokenizer, end_ids=frozenset())
        for number, one in enumerate(requests):
            line = encode_line(one, number, tokenizer, resolved.config, seed=self._request.seed)
            if isinstance(line, BadLine):
                self._failed.add(line)
            else:
                lines.lines[number] = line
        return lines

    @contextmanager
    def _passes(
        self,
        model: PreTrainedModel,
        owner: Handle,
        policy: ScanPolicy,
        lines: BatchLines,
        free_bytes: int,
    ) -> Iterator[_Passes]:
        """By our attention, or by the model's own."""
        size = PassSize()
        most = self._request.max_sequences
        with ExitStack() as stack:
            try:
                paged = stack.enter_context(PagedModel(model))
            except UnsupportedModelError as error:
                self._listener.on_warning(
                    f"this model runs with its own attention, in batches that start together: "
                    f"{error}"
                )
                own = OwnCacheModel(model)
                num_pages = self._num_pages(lines, own.page_bytes(), free_bytes)
                table = PageTable(num_pages)
                facts = {
                    "attention": f"the model's own ({error})",
                    "page_bytes": own.page_bytes(),
                    "pages": num_pages,
                }
                yield _Passes(
                    forward=own,
                    scheduler=CohortScheduler(_in_order(lines), table, max_sequences=most),
                    size=size,
                    choice=self._choice("the model runs with its own attention", num_layers=1),
                    kv=facts,
                )
                facts["most_used_bytes"] = table.most_used * own.page_bytes()
                return
            num_pages = self._num_pages(lines, page_bytes(paged.shapes), free_bytes)
            pages = paged.open_pages(num_pages)
            facts = {
                "attention": pages.attention.status(),
                "page_bytes": pages.page_bytes,
                "pages": num_pages,
            }
            scheduler = PassScheduler(
                _in_order(lines), pages.table, pass_tokens=size.limit, max_sequences=most
            )
            choice = self._choice(why_one_group(owner), num_layers=len(paged.shapes))
            grouped = GroupedForward(
                paged, choice, weights=owner, on_turn=turn_listener(owner, policy)
            )
            stack.enter_context(closing(grouped))
            yield _Passes(forward=grouped, scheduler=scheduler, size=size, choice=choice, kv=facts)
            facts["most_used_bytes"] = pages.most_used_bytes
            facts["attention_seconds"] = paged.attention_seconds

    def _choice(self, refusal: str, *, num_layers: int) -> GroupChoice:
        setting = self._request.token_groups
        if refusal and setting == "2":
            self._listener.on_warning(f"passes run as one group of tokens: {refusal}")
        model = GroupModel(num_threads=torch.get_num_threads(), num_layers=num_layers)
        return GroupChoice(setting, model, refusal=refusal)

    def _num_pages(self, lines: BatchLines, page_bytes: int, free_bytes: int) -> int:
        """Pages for all lines, or what the memory has; lines that do not fit by themselves fail."""
        plan = plan_pages(
            [line.sequence for line in lines.lines.values()],
            kv_memory=self._request.kv_memory,
            max_sequences=self._request.max_sequences,
            page_bytes=page_bytes,
            free_bytes=free_bytes,
        )
        for number, line in list(lines.lines.items()):
            if not plan.can_hold(line.sequence):
                del lines.lines[number]
                self._failed.add(plan.refusal(line.request, line.sequence))
        return plan.num_pages

    def _run(self, forward: StreamedForward, passes: _Passes, lines: BatchLines) -> None:
        size = passes.size
        engine = OfflineEngine(
            forward,
            passes.scheduler,
            size,
            weights=forward.owner,
            choose=lines.choose,
            is_finished=lines.is_finished,
        )
        started = time.perf_counter()
        progress = BatchProgress(lines)
        for sequence in engine.run():
            self._write(lines, lines.lines[sequence.number])
            self.seconds = time.perf_counter() - started
            progress.finish(lines.lines[sequence.number])
            self._listener.on_lines(
                self.num_finished, len(lines.lines), progress.eta_seconds(self.seconds)
            )
        self.report = {
            "passes": asdict(engine.report),
            "n_real": size.n_real,
            "computing": _computing(size),
            "token_groups": passes.choice.report(),
            "kv": passes.kv,
            "experts": forward.owner.report(),
        }

    def _write(self, lines: BatchLines, line: BatchLine) -> None:
        sequence = line.sequence
        self._results.append(
            success(
                line.request,
                model=self._request.model,
                text=lines.text(line),
                finish_reason=line.finish_reason,
                num_prompt_tokens=len(sequence.prompt_ids),
                num_new_tokens=len(sequence.written),
            )
        )
        self.num_finished += 1
        self.prompt_tokens += len(sequence.prompt_ids)
        self.new_tokens += len(sequence.written)


def _computing(size: PassSize) -> dict[str, float] | None:
    """What a pass takes without its reads: so much, and so much a token."""
    fitted = size.fit()
    return None if fitted is None else {"pass_seconds": fitted[0], "token_seconds": fitted[1]}


def _in_order(lines: BatchLines) -> list[Sequence]:
    """The longest answers first: they would else run alone at the end."""
    sequences = [line.sequence for line in lines.lines.values()]
    return sorted(sequences, key=lambda one: -one.max_new_tokens)
