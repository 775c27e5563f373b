"""Prompts shared out among the ranks that run one model together."""

import gc
import hashlib
import json
import signal
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from types import FrameType
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_runtime.errors import ParityError
from moe_runtime.integrations.transformers.handle import handle
from moe_runtime.integrations.transformers.progress import quiet_transformers
from moe_runtime.integrations.transformers.resolve import ResolvedModel, resolve_model
from moe_runtime.measure.completion import Completion, complete
from moe_runtime.measure.fast_parity import MIN_POSITIONS
from moe_runtime.measure.forced import forced_logits
from moe_runtime.measure.generation import Listener
from moe_runtime.measure.generation_check import (
    compare_with_unmodified,
    greedy_in_float32,
    needs_float32,
    needs_forced_logits,
)
from moe_runtime.measure.generation_request import GenerationRequest, load_requested
from moe_runtime.measure.parity import Parity
from moe_runtime.measure.parity_evidence import ParityEvidence
from moe_runtime.measure.process_memory import peak_resident_bytes, resident_bytes
from moe_runtime.measure.process_reads import read_from_disk_bytes
from moe_runtime.measure.prompt import Prompt, read_prompts
from moe_runtime.parallel.expert_parallel import ExpertParallel
from moe_runtime.parallel.world import check_agreement
from moe_runtime.placement.cocluster import DeviceTables
from moe_runtime.placement.share_requests import share_requests

_SAME_ON_ALL = (
    "ranks", "nodes", "dispatch", "payload", "chosen", "expected_bytes", "forwards",
    "forwards_by_chunks", "migrations", "experts_moved",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelGeneration:
    """What all ranks made of a request; every rank has all of it, and rank 0 the verdict.

    `parity` is None where no check was asked for, one failed to run, or a stop came before.
    """

    request: GenerationRequest
    by_rank: list[dict[str, Any]]  # results, report and resident memory of each rank
    num_prompts: int
    rank: int
    parity: Parity | None
    parity_error: ParityError | None

    @property
    def results(self) -> list[dict[str, Any]]:
        """In the order of the prompts; those that a stop left out are absent."""
        found = [result for rank in self.by_rank for result in rank["results"]]
        return sorted(found, key=lambda result: int(result["index"]))

    @property
    def num_tokens(self) -> int:
        """New tokens of all prompts."""
        return sum(len(result["token_ids"]) for result in self.results)

    @property
    def is_terminated(self) -> bool:
        """Whether a rank was asked to stop before all was done."""
        reasons = {result["finish_reason"] for result in self.results}
        return "terminated" in reasons or len(self.results) < self.num_prompts

    def require_parity(self) -> None:
        """Raise ParityError if a check was asked for and did not end well; on rank 0."""
        if self.parity_error is not None:
            raise self.parity_error
        if self.parity is not None:
            self.parity.require()

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        request = asdict(self.request)
        del request["prompts"]
        decoding = request.pop("decoding")
        first = self.by_rank[0]["report"]
        versions = {name: version(name) for name in ("torch", "transformers")}
        check = {"parity": self.parity.as_dict() if self.parity else None}
        return {
            "results": self.results,
            **(check if self.request.check else {}),
            "is_terminated": self.is_terminated,
            "parallel": self.traffic(),
            "ranks": [
                {
                    "rank": rank,
                    "prompts": len(one["results"]),
                    "cache": one["report"]["cache"],
                    "memory": one["report"]["memory"] | one["resident"],
                }
                for rank, one in enumerate(self.by_rank)
            ],
            "settings": request | decoding | first["settings"] | {"versions": versions},
        }

    def traffic(self) -> dict[str, Any]:
        """Bytes and messages from rank (row) to rank (column), and sums over ranks."""
        reports = [one["report"]["parallel"] for one in self.by_rank]
        first = reports[0]
        sums = (
            "moe_bytes",
            "moe_predicted_bytes",
            "bytes_within_node",
            "bytes_between_nodes",
            "migration_bytes",
            "context_bytes",
            "attention_bytes",
        )
        return {
            **{name: first[name] for name in _SAME_ON_ALL},
            "experts_held": [report["experts_held"] for report in reports],
            "bytes": [report["bytes_to_rank"] for report in reports],
            "messages": [report["messages_to_rank"] for report in reports],
            "per_layer_bytes": [
                sum(of_layer)
                for of_layer in zip(*(r["per_layer_bytes"] for r in reports), strict=True)
            ],
            **{name: sum(report[name] for report in reports) for name in sums},
            "all_to_alls": [report["calls"].get("all_to_all", 0) for report in reports],
            "local_activation_rate": _local_rates([report["activations"] for report in reports]),
        }


def run_parallel_generation(request: GenerationRequest, listener: Listener) -> ParallelGeneration:
    """Load this rank's share of the experts, run its share of the prompts, gather all results.

    Prompt i runs on rank i modulo the number of ranks, or where tables say that its experts are;
    with tensor-parallel attention on all. Every rank calls this with the same request.
    SIGTERM lets each rank end at its next token, on all ranks, with what was written so far.
    """
    after_imports = resident_bytes()
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
        model = load_requested(request, resolved)
        owner = handle(model)
        parallel = owner.parallel
        assert parallel is not None
        with closing(owner), _stop_on_sigterm(parallel):
            listener.on_loaded(owner.placement())
            request = _agree(parallel, request)
            if request.migrate is not None:
                parallel.ask_to_migrate(request.migrate, after_forwards=request.migrate_after)
            rank, num_ranks = parallel.world.rank, parallel.world.num_ranks
            is_everywhere = request.attention == "tensor"
            ranks = _ranks_of(prompts, request.tables, num_ranks)
            mine = [p for p, g in zip(prompts, ranks, strict=True) if is_everywhere or g == rank]
            completions = _complete_mine(model, tokenizer, mine, request, parallel, listener)
            parallel.finish()
            report = owner.report()
            if rank == 0 and request.migrate is not None and not parallel.num_migrations:
                warnings.warn(
                    f"--migrate-after {request.migrate_after} was not reached: there were "
                    f"{report['parallel']['forwards']} forwards, so no expert moved",
                    stacklevel=2,
                )
            evidence = None
            if request.check and not parallel.is_stop_asked:
                evidence = _evidence(
                    request, resolved, model, tokenizer, completions, parallel, report
                )
            if is_everywhere and rank:
                completions = []  # rank 0 has the same
            said = {
                "results": [one.as_dict() | {"rank": rank} for one in completions],
                "report": report,
                "resident": {
                    "rss_after_imports_bytes": after_imports,
                    "peak_rss_bytes": peak_resident_bytes(),
                    "read_from_disk_bytes": read_from_disk_bytes(),
                },
            }
            texts = parallel.world.ledger.gather_texts(json.dumps(said))
    parity, parity_error = None, None
    if evidence is not None and rank == 0:
        del model, owner
        gc.collect()  # the unmodified model needs the memory
        listener.on_check()
        try:
            parity = compare_with_unmodified(
                request, resolved, evidence.greedy, evidence.forced, report
            )
        except ParityError as error:  # what was generated is not lost with it
            parity_error = error
    return ParallelGeneration(
        request=request,
        by_rank=[json.loads(text) for text in texts],
        num_prompts=len(prompts),
        rank=rank,
        parity=parity,
        parity_error=parity_error,
    )


def _evidence(
    request: GenerationRequest,
    resolved: ResolvedModel,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    completions: list[Completion],
    parallel: ExpertParallel,
    report: Mapping[str, Any],
) -> ParityEvidence:
    """What all ranks have to show for a check, on rank 0; collective.

    It is gathered before the group is left: other ranks need not wait for the unmodified model.
    """
    is_everywhere = request.attention == "tensor"
    forced = []
    if needs_forced_logits(request, report):
        sharers = 1 if is_everywhere else min(parallel.world.num_ranks, len(request.prompts))
        forced = forced_logits(model, completions, min_positions=-(-MIN_POSITIONS // sharers))
        parallel.finish()
    greedy = completions
    if needs_float32(request, report):
        greedy = greedy_in_float32(request, resolved, tokenizer, completions, report)
    if not request.exact:
        greedy = [replace(one, logits=None) for one in greedy]  # their tokens alone are compared
    mine = ParityEvidence(greedy=greedy, forced=forced)
    if is_everywhere:
        return mine
    gathered = parallel.world.ledger.gather_on_first(mine.to_bytes())
    return ParityEvidence.merged([ParityEvidence.from_bytes(part) for part in gathered])


def _ranks_of(prompts: Sequence[Prompt], tables: str | None, num_ranks: int) -> list[int]:
    """The rank of each prompt; ranks get equally many, or one more."""
    if tables is None:
        return [number % num_ranks for number in range(len(prompts))]
    return share_requests([prompt.token_ids for prompt in prompts], DeviceTables.load(tables))


def _local_rates(activations: Sequence[dict[str, int]]) -> dict[str, float | None] | None:
    """Shares of (token, expert) pairs whose expert is where the token is; None if not counted."""
    total = {name: sum(one[name] for one in activations) for name in activations[0]}
    if not total["seen_pairs"] + total["unseen_pairs"]:
        return None
    rates = {
        name: total[f"{name}_local_pairs"] / total[f"{name}_pairs"]
        if total[f"{name}_pairs"]
        else None
        for name in ("seen", "unseen")
    }
    return rates | {"of_equal_parts": 1 / len(activations)}


def _agree(parallel: ExpertParallel, request: GenerationRequest) -> GenerationRequest:
    """The same prompts and settings on all ranks; the seed is that of rank 0."""
    ledger = parallel.world.ledger
    seed = int(ledger.gather_texts(str(request.decoding.seed))[0])
    request = replace(request, decoding=replace(request.decoding, seed=seed))
    prompts = hashlib.sha256(json.dumps(list(request.prompts)).encode()).hexdigest()
    facts = {
        "prompts": prompts[:16],
        "generation settings": repr(request.decoding),
        "migration": f"{request.migrate} after {request.migrate_after}",
    }
    check_agreement(ledger, facts)
    return request


def _complete_mine(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    request: GenerationRequest,
    parallel: ExpertParallel,
    listener: Listener,
) -> list[Completion]:
    completions = []
    for prompt in prompts:
        if parallel.is_stop_asked:
            break
        listener.on_prompt(prompt)
        completion = complete(
            model,
            tokenizer,
            prompt,
            request.decoding,
            keep_logits=request.check,
            is_stop_asked=lambda: parallel.is_stop_asked,
        )
        listener.on_completion(completion)
        completions.append(completion)
    return completions


@contextmanager
def _stop_on_sigterm(parallel: ExpertParallel) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        parallel.ask_to_stop()

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
