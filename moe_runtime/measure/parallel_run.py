"""Runs prompts shared out among the ranks that have one model together."""

import gc
import hashlib
import json
import signal
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
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
from moe_runtime.measure.parallel_generation import ParallelGeneration
from moe_runtime.measure.parity_evidence import ParityEvidence
from moe_runtime.measure.process_memory import peak_resident_bytes, resident_bytes
from moe_runtime.measure.process_reads import read_from_disk_bytes
from moe_runtime.measure.prompt import Prompt, read_prompts
from moe_runtime.parallel.expert_parallel import ExpertParallel
from moe_runtime.parallel.world import check_agreement
from moe_runtime.placement.cocluster import DeviceTables
from moe_runtime.placement.share_requests import share_requests


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
