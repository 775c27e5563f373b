"""A trace of what a predictor expects of prompts, written without running the model's layers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from moe_runtime.errors import PredictorError
from moe_runtime.integrations.transformers.progress import quiet_transformers
from moe_runtime.integrations.transformers.resolve import resolve_model
from moe_runtime.measure.prompt import read_prompts
from moe_runtime.memory.checkpoint_digest import checkpoint_digest
from moe_runtime.predictors.metrics import top_experts
from moe_runtime.predictors.predictor import Predictor, StepRows
from moe_runtime.predictors.store import check_fingerprint
from moe_runtime.trace import Phase, Trace
from moe_runtime.trace_fields import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictedPrompts:
    """What to predict: prompts of a model, by its own tokenizer."""

    model: str
    prompts: Sequence[str]
    domains: Sequence[str]
    revision: str | None = None
    trust_remote_code: bool = False
    chat: bool = False

    def token_ids(self) -> list[list[int]]:
        """Of each prompt; raises as `trace record` does for one that does not fit the model."""
        resolved = resolve_model(
            self.model, revision=self.revision, trust_remote_code=self.trust_remote_code
        )
        with quiet_transformers(lambda done, total: None):
            _, encoded = read_prompts(
                resolved.folder,
                resolved.config,
                self.prompts,
                max_new_tokens=1,
                chat=self.chat,
                trust_remote_code=self.trust_remote_code,
            )
        return [prompt.token_ids for prompt in encoded]

    def check(self, predictor: Predictor, source: str) -> None:
        """Raise PredictorError, with both fingerprints, if the predictor is of another model."""
        resolved = resolve_model(
            self.model, revision=self.revision, trust_remote_code=self.trust_remote_code
        )
        path = Path(self.model)
        expected = replace(
            predictor.fingerprint,
            # The folder's name, not its place, as in a recorded trace.
            model=path.resolve().name if path.is_dir() else self.model,
            checkpoint=checkpoint_digest(resolved.folder),
        )
        check_fingerprint(predictor, expected, source)


def predict_trace(
    predictor: Predictor,
    token_ids: Sequence[Sequence[int]],
    domains: Sequence[str],
    on_progress: Callable[[int, int], None],
) -> Trace:
    """One step a prompt, and for every token the experts most probable before the first layer runs.

    Weights are what was said of those experts, made to sum to 1. Raises PredictorError for a
    predictor that has to see the model run.
    """
    if "hidden" in predictor.needs:
        raise PredictorError(
            f"predictor {predictor.name} looks at what the routers see, and nothing runs here; use "
            "one that reads token ids, such as token_table or routing_path"
        )
    of, session = predictor.fingerprint, predictor.start()
    topk, weights = [], []
    for sequence, ids in enumerate(token_ids):
        probability = session.begin(StepRows.of_prompt(sequence, ids)).probability
        chosen = top_experts(np.nan_to_num(probability), of.top_k)
        said = np.take_along_axis(probability, chosen.astype(np.int64), -1)
        topk.append(chosen)
        weights.append(said / np.maximum(said.sum(-1, keepdims=True), 1e-9))
        session.forget(sequence)
        on_progress(sequence + 1, len(token_ids))
    lengths = [len(ids) for ids in token_ids]
    of_row = np.repeat(np.arange(len(token_ids)), lengths)
    fields: dict[str, Array | int | str] = {
        "topk": np.concatenate(topk),
        "weights": np.concatenate(weights).astype(np.float16),
        "token_id": np.concatenate([np.asarray(ids, np.int32) for ids in token_ids]),
        "sequence_id": of_row,
        "position": np.concatenate([np.arange(length) for length in lengths]),
        "phase": np.full(sum(lengths), Phase.PREFILL, np.uint8),
        "step": of_row,
        "domain": np.array(domains, np.str_)[of_row],
        "num_experts": of.num_experts,
        "model": of.model,
        "checkpoint": of.checkpoint,
    }
    if of.layer_ids:
        fields |= {
            "layer_ids": np.array(of.layer_ids, np.int32),
            "num_hidden_layers": of.num_hidden_layers,
        }
    return Trace.of(fields, source="prediction")
