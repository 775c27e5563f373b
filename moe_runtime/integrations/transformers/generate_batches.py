"""Generation for many prompts in batches that are formed by the experts they are expected to use.

N sequences of a unit, L MoE layers, E experts a layer, P = L x E, S tokens of a batch's rows.
"""

import inspect
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from moe_runtime.errors import PredictorError
from moe_runtime.integrations.transformers.handle import sites_of
from moe_runtime.integrations.transformers.kv_rows import (
    append_rows,
    exchange_rows,
    row_bytes,
    select_rows,
)
from moe_runtime.integrations.transformers.next_token import Sampling, TokenChooser, end_ids
from moe_runtime.integrations.transformers.sites import ExpertSite
from moe_runtime.predictors.predictor import Predictor
from moe_runtime.predictors.store import load_predictor
from moe_runtime.scheduling.expected_paths import ExpectedPaths, check_sees_tokens
from moe_runtime.scheduling.token_scheduler import activated, exchange
from moe_runtime.scheduling.unit_planner import Unit, UnitPlanner
from moe_runtime.trace_fields import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedSequence:
    """What was written after one prompt. `text` is None where no tokenizer was given."""

    index: int
    prompt_ids: list[int]
    token_ids: list[int]
    finish_reason: str  # "stop": end of sequence; "length": no more tokens allowed
    text: str | None = None


@dataclass(slots=True, kw_only=True)
class SchedulingReport:
    """What the schedulers did, and what they expected of it.

    `expected_experts` are those that the batches of all decode steps were expected to activate as
    they ran, `expected_unmoved` the same if no sequence had changed its batch in that step.
    """

    units: int = 0
    decode_steps: int = 0
    exchanges: int = 0  # of two sequences between the batches of a unit
    kv_bytes_copied: int = 0
    expected_experts: int = 0
    expected_unmoved: int = 0
    scheduling_seconds: float = 0.0  # beside the computing of the unit before
    waited_seconds: float = 0.0  # of these, what the computing waited for
    grouping_seconds: float = 0.0  # within the decode steps

    def as_dict(self) -> dict[str, float | int]:
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchedGeneration:
    """Sequences in the order of their prompts."""

    sequences: list[GeneratedSequence]
    report: SchedulingReport


def generate_batches(
    model: PreTrainedModel,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    predictor: Predictor | str | Path | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 64,
    max_passes: int = 4,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> BatchedGeneration:
    """Continue many prompts, two batches of `batch_size` sequences at a time.

    With a `predictor` (or its file) that reads token ids, prompts that are expected to use the same
    experts run in the same unit of two batches (Read-ME's expert-aware batching; none is passed
    over more than `max_passes` times for it), and the sequences of a unit are dealt out to its two
    batches so that each activates few experts (ExpertFlow's token scheduler); at every token two
    sequences are exchanged where that saves more bytes of experts than it copies of the attention
    cache. Without a predictor they run in the order given. Each sequence gets the tokens that it
    would get alone, as far as rounding does not depend on the batch. `prompts` are texts, with a
    `tokenizer`, or token ids; the model may be offloaded or not. `on_progress` hears of each
    sequence that is finished.

    Raises ValueError for a prompt that is empty or leaves no room in the model's context, and
    PredictorError for a predictor that needs more than token ids or is of another model's size.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    if batch_size < 1 or max_new_tokens < 1:
        raise ValueError(
            f"batch_size ({batch_size}) and max_new_tokens ({max_new_tokens}) must be at least 1"
        )
    ids = _token_ids(prompts, tokenizer)
    _check_lengths(ids, model, max_new_tokens)
    if isinstance(predictor, str | Path):
        predictor = load_predictor(Path(predictor))
    sites = sites_of(model)
    paths = None
    if predictor is not None:
        _check_size(predictor, sites)
        check_sees_tokens(predictor)
        paths = ExpectedPaths(predictor)
    planner = UnitPlanner(ids, paths, sites[0].num_experts, batch_size, max_passes)
    expert_bytes = max(site.expert_bytes for site in sites)
    run = _Run(model, ids, paths, TokenChooser(sampling), batch_size, max_new_tokens, expert_bytes)
    finished: list[GeneratedSequence] = []
    was_training = model.training
    model.eval()
    try:
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="scheduling") as pool:
            # The next unit is predicted and formed while this one computes.
            planned: Future[Unit | None] = pool.submit(planner.next_unit)
            while True:
                started = time.perf_counter()
                unit = planned.result()
                run.report.waited_seconds += time.perf_counter() - started
                if unit is None:
                    break
                planned = pool.submit(planner.next_unit)
                for sequence in run.unit(unit):
                    finished.append(_with_text(sequence, tokenizer))
                    on_progress(len(finished), len(ids))
    finally:
        model.train(was_training)
    run.report.scheduling_seconds = planner.seconds
    finished.sort(key=lambda sequence: sequence.index)
    return BatchedGeneration(sequences=finished, report=run.report)


@dataclass(slots=True)
class _Batch:
    """Rows that run as one: `sequences[i]` is row `i` of mask and cache."""

    sequences: list[int]
    cache: Any
    mask_NS: torch.Tensor


class _Run:
    """Runs units on the model."""

    def __init__(
        self,
        model: PreTrainedModel,
        ids: Sequence[list[int]],
        paths: ExpectedPaths | None,
        chooser: TokenChooser,
        batch_size: int,
        max_new_tokens: int,
        expert_bytes: int,
    ) -> None:
        self.report = SchedulingReport()
        self._model = model
        self._ids = ids
        self._chooser = chooser
        self._batch_size = batch_size
        self._max_new_tokens = max_new_tokens
        self._ends = end_ids(model)
        self._accepts = set(inspect.signature(model.forward).parameters)
        self._expert_bytes = expert_bytes
        self._paths = paths
        self._written: dict[int, list[int]] = {}

    @torch.no_grad()
    def unit(self, unit: Unit) -> Iterable[GeneratedSequence]:
        """Yields each sequence when it ends."""
        self.report.units += 1
        self._written = {sequence: [] for sequence in unit.sequences}
        length = max(len(self._ids[sequence]) for sequence in unit.sequences)
        batches = []
        for is_second in (False, True):
            members = np.flatnonzero(unit.is_second_N == is_second)
            if len(members):
                batches.append(self._prefill([unit.sequences[i] for i in members], length))
        yield from self._end(batches)
        while batches:
            self._regroup(batches)
            self.report.decode_steps += 1
            for batch in batches:
                self._step(batch)
            yield from self._end(batches)

    def _prefill(self, sequences: list[int], length: int) -> _Batch:
        """Prompts padded on the left to `length`, and their first tokens."""
        ids_NS = torch.zeros(len(sequences), length, dtype=torch.long)
        mask_NS = torch.zeros_like(ids_NS)
        for row, sequence in enumerate(sequences):
            ids = self._ids[sequence]
            ids_NS[row, length - len(ids) :] = torch.tensor(ids)
            mask_NS[row, length - len(ids) :] = 1
        cache = DynamicCache(config=self._model.config)
        batch = _Batch(sequences, cache, mask_NS.to(self._model.device))
        self._forward(batch, ids_NS)
        return batch

    def _step(self, batch: _Batch) -> None:
        last = [[self._written[sequence][-1]] for sequence in batch.sequences]
        batch.mask_NS = torch.cat([batch.mask_NS, torch.ones_like(batch.mask_NS[:, :1])], 1)
        self._forward(batch, torch.tensor(last))

    def _forward(self, batch: _Batch, ids_NS: torch.Tensor) -> None:
        """Run `ids_NS` and write one token to each sequence."""
        positions_NS = (batch.mask_NS.cumsum(1) - 1).clamp(min=0)[:, -ids_NS.shape[1] :]
        optional = {"position_ids": positions_NS, "logits_to_keep": 1}
        output = self._model(
            input_ids=ids_NS.to(self._model.device),
            attention_mask=batch.mask_NS,
            past_key_values=batch.cache,
            use_cache=True,
            **{name: value for name, value in optional.items() if name in self._accepts},
        )
        chosen = self._chooser.choose(output.logits[:, -1], batch.sequences)
        for sequence, token in zip(batch.sequences, chosen, strict=True):
            self._written[sequence].append(token)

    def _end(self, batches: list[_Batch]) -> Iterable[GeneratedSequence]:
        """Take finished sequences out of their batches, and empty batches out of the unit."""
        for batch in list(batches):
            stay = []
            for row, sequence in enumerate(batch.sequences):
                tokens = self._written[sequence]
                is_stopped = tokens[-1] in self._ends
                if not is_stopped and len(tokens) < self._max_new_tokens:
                    stay.append(row)
                    continue
                if self._paths is not None:
                    self._paths.forget(sequence)
                yield GeneratedSequence(
                    index=sequence,
                    prompt_ids=self._ids[sequence],
                    token_ids=tokens,
                    finish_reason="stop" if is_stopped else "length",
                )
            if not stay:
                batches.remove(batch)
            elif len(stay) < len(batch.sequences):
                select_rows(batch.cache, len(batch.sequences), stay)
                batch.mask_NS = batch.mask_NS[stay]
                batch.sequences = [batch.sequences[row] for row in stay]

    def _regroup(self, batches: list[_Batch]) -> None:
        """One batch where that holds all that is left; else exchanges by paths, where they pay."""
        started = time.perf_counter()
        sequences = [sequence for batch in batches for sequence in batch.sequences]
        path_NP = None
        if self._paths is not None:
            path_NP = self._paths.of_tokens([(s, self._written[s][-1]) for s in sequences])
        if len(batches) == 2:
            first, second = batches
            if len(sequences) <= self._batch_size:
                self._merge(batches)
            elif path_NP is not None:
                before_N = np.arange(len(sequences)) >= len(first.sequences)
                pair_bytes = sum(row_bytes(b.cache, len(b.sequences)) for b in batches)
                after_N = exchange(path_NP, before_N, pair_bytes / self._expert_bytes)
                self.report.expected_experts += activated(path_NP, after_N)
                self.report.expected_unmoved += activated(path_NP, before_N)
                num_exchanged = self._exchange(first, second, before_N, after_N)
                self.report.exchanges += num_exchanged
                self.report.kv_bytes_copied += num_exchanged * pair_bytes
        self.report.grouping_seconds += time.perf_counter() - started

    def _exchange(self, first: _Batch, second: _Batch, before_N: Array, after_N: Array) -> int:
        """Exchange the sequences whose batch changes, with their rows; returns how many pairs."""
        size = len(first.sequences)
        leaving = np.flatnonzero(after_N & ~before_N).tolist()
        coming = (np.flatnonzero(~after_N & before_N) - size).tolist()
        if not leaving:
            return 0
        pairs = list(zip(leaving, coming, strict=True))
        exchange_rows((first.cache, second.cache), (size, len(second.sequences)), pairs)
        for i, j in pairs:
            first.sequences[i], second.sequences[j] = second.sequences[j], first.sequences[i]
            mask_S = first.mask_NS[i].clone()
            first.mask_NS[i], second.mask_NS[j] = second.mask_NS[j], mask_S
        return len(pairs)

    def _merge(self, batches: list[_Batch]) -> None:
        first, second = batches
        sizes = len(first.sequences), len(second.sequences)
        append_rows((first.cache, second.cache), sizes)
        first.sequences += second.sequences
        first.mask_NS = torch.cat([first.mask_NS, second.mask_NS])
        del batches[1]


def _token_ids(
    prompts: Sequence[str] | Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase | None
) -> list[list[int]]:
    found = []
    prompt: Any
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            if tokenizer is None:
                raise ValueError(
                    f"prompt {index} is text, and no tokenizer was given; pass tokenizer=, or "
                    "token ids"
                )
            prompt = tokenizer(prompt, verbose=False)["input_ids"]
        found.append([int(token) for token in prompt])
    return found


def _check_lengths(ids: Sequence[list[int]], model: PreTrainedModel, max_new_tokens: int) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for index, prompt in enumerate(ids):
        if not prompt:
            raise ValueError(f"prompt {index} is empty: it has no tokens; write at least a word")
        if isinstance(context, int) and len(prompt) + max_new_tokens > context:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens, which with max_new_tokens "
                f"({max_new_tokens}) is more than the model's context of {context}; shorten one"
            )


def _check_size(predictor: Predictor, sites: Sequence[ExpertSite]) -> None:
    of = predictor.fingerprint
    sizes = len(sites), sites[0].num_experts, sites[0].top_k
    if (of.num_layers, of.num_experts, of.top_k) != sizes:
        raise PredictorError(
            f"predictor {predictor.name} belongs to another model: it is of {of}; this one has "
            f"{sizes[0]} layers of {sizes[1]} experts, top-{sizes[2]}; train one on a trace of it"
        )


def _with_text(
    sequence: GeneratedSequence, tokenizer: PreTrainedTokenizerBase | None
) -> GeneratedSequence:
    if tokenizer is None:
        return sequence
    text = str(tokenizer.decode(sequence.token_ids, skip_special_tokens=True))
    return replace(sequence, text=text)
