"""What a check of a generation runs beside it: its prompts in float32, and the unmodified model."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from moe_runtime.integrations.transformers.handle import handle
from moe_runtime.integrations.transformers.progress import quiet_transformers
from moe_runtime.integrations.transformers.resolve import ResolvedModel
from moe_runtime.measure.completion import Completion, complete
from moe_runtime.measure.decoding import Decoding
from moe_runtime.measure.fast_parity import MAX_RATIO, MAX_RATIO_ON_RANKS
from moe_runtime.measure.forced import ForcedLogits
from moe_runtime.measure.generation_request import GenerationRequest, load_requested
from moe_runtime.measure.parity import Parity, Reference, check_fast_parity, check_parity
from moe_runtime.measure.planned_load import OFF
from moe_runtime.memory.packed_folder import is_packed
from moe_runtime.memory.unpack_folder import unpack_folder
from moe_runtime.parallel.payload import ExactPayload


def needs_forced_logits(request: GenerationRequest, report: Mapping[str, Any]) -> bool:
    """Whether logits are judged by their distance from a float32 run."""
    return request.check and not request.exact and report["settings"]["dtype"] != "float32"


def needs_float32(request: GenerationRequest, report: Mapping[str, Any]) -> bool:
    """Whether the greedy tokens that are compared are others than those that were asked for."""
    is_greedy = request.decoding.temperature == 0 and not request.decoding.stop
    is_float32 = report["settings"]["dtype"] == "float32"
    is_rounded = request.payload != ExactPayload.name
    return request.check and not request.exact and not (is_float32 and is_greedy and not is_rounded)


def greedy_in_float32(
    request: GenerationRequest,
    resolved: ResolvedModel,
    tokenizer: PreTrainedTokenizerBase,
    completions: Sequence[Completion],
    report: Mapping[str, Any],
) -> list[Completion]:
    """The same prompts through at least the same number of slots, with twice the bytes.

    On several ranks collective, in the process group that is there.
    """
    memory = report["memory"]
    wide = replace(
        request,
        dtype="float32",
        expert_memory=str(
            2 * max(memory["expert_used_bytes"], report["cache"]["slots"] * memory["expert_bytes"])
        ),
        expert_slots="auto",
        expert_dtype="auto",  # rounds bfloat16 weights alone; logits are judged with it
        payload=ExactPayload.name,
        max_memory=None,
        plan=OFF,
        predictor="off",
        warm_start=False,
        check=False,
        timeout_seconds=None,
    )
    decoding = Decoding(max_new_tokens=request.decoding.max_new_tokens)
    with quiet_transformers(lambda done, total: None):
        model = load_requested(wide, resolved)
        with closing(handle(model)) as owner:
            found = [complete(model, tokenizer, one.prompt, decoding) for one in completions]
            if owner.parallel is not None:
                owner.parallel.finish()
            return found


def compare_with_unmodified(
    request: GenerationRequest,
    resolved: ResolvedModel,
    completions: Sequence[Completion],
    forced: Sequence[ForcedLogits],
    report: Mapping[str, Any],
) -> Parity:
    """Load the unmodified model whole, in a process of its own, and judge by the rule of the path.

    `completions` kept their logits where the request is exact. Raises ParityError where nothing
    can be known.
    """
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
        return check_fast_parity(
            completions,
            forced,
            reference,
            expert_dtype=request.expert_dtype,
            max_ratio=MAX_RATIO_ON_RANKS if request.is_parallel else MAX_RATIO,
        )


@contextmanager
def _reference_folder(folder: Path) -> Iterator[Path]:
    """What unmodified transformers can read: a packed model is restored, for as long as needed."""
    if not is_packed(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="moe-runtime-unpacked-") as restored:
        yield unpack_folder(folder, Path(restored, folder.name)).folder
