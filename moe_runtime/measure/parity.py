"""Compares what ran here with unmodified transformers in a process of its own."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from moe_runtime.errors import ParityError
from moe_runtime.measure.completion import Completion
from moe_runtime.measure.decoding import Decoding
from moe_runtime.measure.fast_parity import MAX_RATIO, FastParity, rms_distance
from moe_runtime.measure.forced import ForcedLogits

_REFERENCE_SCRIPT = Path(__file__).with_name("reference.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactParity:
    """How far completions agree. `difference` says in words where they first do not.

    `max_abs_logit_diff` covers all steps up to the first token that differs; None if a logit is
    NaN or infinite on one side only.
    """

    reference: str
    dtype: str
    tokens_compared: int
    identical: bool
    max_abs_logit_diff: float | None
    difference: str = ""

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints of it."""
        found = {key: value for key, value in asdict(self).items() if key != "difference"}
        return {"mode": "exact"} | found

    @property
    def is_right(self) -> bool:
        """Whether the rule of the mode holds."""
        return self.identical

    def text(self) -> str:
        """What was compared, in words."""
        if not self.identical:
            return self.difference
        return f"{self.tokens_compared} tokens and their logits, bit for bit ({self.dtype})"

    def require(self) -> None:
        """Raise ParityError unless everything is identical."""
        if not self.identical:
            raise ParityError(
                f"the output differs from {self.reference}: {self.difference}; "
                "please report the model and the versions that moe-runtime doctor prints"
            )


Parity = ExactParity | FastParity


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """How to run the unmodified model."""

    folder: Path
    dtype: str  # as `from_pretrained` takes it, "auto" included
    effective_dtype: str
    device: str = "cpu"
    trust_remote_code: bool = False
    quantisation: str | None = None  # what the process must dequantise

    @property
    def name(self) -> str:
        how = "" if self.quantisation is None else f", {self.quantisation} dequantised"
        return f"transformers {version('transformers')}, eager experts{how}, in its own process"


def check_parity(
    completions: Sequence[Completion], decoding: Decoding, reference: Reference
) -> ExactParity:
    """Run the prompts of `completions`, which kept their logits, through the unmodified model.

    That model is loaded whole: it needs memory for all experts. Raises ParityError when its process
    dies or fails: then nothing is known.
    """
    run: dict[str, Any] = {
        "dtype": reference.dtype,
        "generate_arguments": decoding.generate_arguments(),
        "prompts": [
            _prompt(completion, decoding.seed + completion.prompt.index)
            for completion in completions
        ],
        "forced": [],
    }
    answers = _run(reference, [run])[0]
    return compare(completions, answers, reference)


def check_fast_parity(
    greedy: Sequence[Completion],
    forced: Sequence[ForcedLogits],
    reference: Reference,
    *,
    expert_dtype: str = "auto",
    max_ratio: float = MAX_RATIO,
) -> FastParity:
    """Apply the rule of the fast path; see `FastParity`.

    `greedy` is what we wrote greedily in float32, `forced` our logits in the model's dtype along
    given tokens. The unmodified model runs in float32 for both, and in its dtype for the latter.
    Raises ParityError when its process dies or fails.
    """
    sequences = [
        {"token_ids": one.token_ids, "num_prompt_tokens": one.num_prompt_tokens} for one in forced
    ]
    float32: dict[str, Any] = {
        "dtype": "float32",
        "generate_arguments": Decoding().generate_arguments(),
        "prompts": [_prompt(completion, 0) for completion in greedy],
        "forced": sequences,
    }
    eager: dict[str, Any] = {"dtype": reference.dtype, "prompts": [], "forced": sequences}
    runs = [float32, eager] if sequences else [float32]
    answers = _run(reference, runs)
    tokens_compared, difference = 0, ""
    for completion, answer in zip(greedy, answers[0], strict=False):
        theirs = answer["token_ids"].tolist()
        tokens_compared += _shared_steps(completion.token_ids, theirs)
        difference = difference or _difference(
            completion.prompt.index, completion.token_ids, theirs, gap=0.0
        )
    ours_rms, eager_rms = None, None
    if sequences:
        true = [answer["logits"] for answer in answers[0][len(greedy) :]]
        ours_rms = rms_distance([one.logits for one in forced], true)
        eager_rms = rms_distance([answer["logits"] for answer in answers[1]], true)
    return FastParity(
        reference=reference.name,
        dtype=reference.effective_dtype,
        tokens_compared=tokens_compared,
        greedy_tokens_equal=not difference,
        positions=sum(len(one.logits) for one in forced),
        rms_distance=ours_rms,
        eager_rms_distance=eager_rms,
        difference=difference,
        expert_dtype=expert_dtype,
        max_ratio=max_ratio,
    )


def compare(
    completions: Sequence[Completion],
    answers: Sequence[dict[str, torch.Tensor]],
    reference: Reference,
) -> ExactParity:
    """`answers` holds `token_ids` `[tokens]` and `logits` `[tokens, vocab]` for each completion."""
    tokens_compared, largest, difference = 0, 0.0, ""
    for completion, answer in zip(completions, answers, strict=True):
        assert completion.logits is not None
        ours, theirs = completion.token_ids, answer["token_ids"].tolist()
        steps = _shared_steps(ours, theirs)
        gap = _largest_gap(completion.logits[:steps], answer["logits"][:steps])
        tokens_compared += steps
        largest = max(largest, gap)
        difference = difference or _difference(completion.prompt.index, ours, theirs, gap)
    return ExactParity(
        reference=reference.name,
        dtype=reference.effective_dtype,
        tokens_compared=tokens_compared,
        identical=not difference,
        max_abs_logit_diff=largest if largest < float("inf") else None,
        difference=difference,
    )


def _prompt(completion: Completion, seed: int) -> dict[str, Any]:
    return {
        "token_ids": completion.prompt.token_ids,
        "max_new_tokens": completion.prompt.max_new_tokens,
        "seed": seed,
    }


def _run(
    reference: Reference, runs: Sequence[dict[str, Any]]
) -> list[list[dict[str, torch.Tensor]]]:
    """For each run the answers to its prompts, then those to its forced sequences."""
    message = {
        "folder": str(reference.folder),
        "device": reference.device,
        "trust_remote_code": reference.trust_remote_code,
        "quantisation": reference.quantisation,
        "num_threads": torch.get_num_threads(),
        "runs": runs,
    }
    with tempfile.TemporaryDirectory(prefix="moe-runtime-parity-") as folder:
        request = Path(folder, "request.json")
        request.write_text(json.dumps(message))
        _run_process(request)
        return [
            [
                load_file(request.with_name(f"answer-{number}-{index}.safetensors"))
                for index in range(len(run["prompts"]) + len(run["forced"]))
            ]
            for number, run in enumerate(runs)
        ]


def _run_process(request: Path) -> None:
    # -P: the folder of the script is not searched for modules, so nothing there shadows another.
    command = [sys.executable, "-P", str(_REFERENCE_SCRIPT), str(request)]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return
    last_line = done.stderr.strip().rpartition("\n")[2] or f"exit code {done.returncode}"
    if done.returncode < 0:
        last_line = f"killed by signal {-done.returncode}"
    if done.returncode == -9 or "MemoryError" in last_line or "out of memory" in last_line:
        raise ParityError(
            f"no parity verdict: the unmodified model ran out of memory ({last_line}), as it must "
            "hold all experts; check on a machine with more memory, or leave out --check"
        )
    raise ParityError(
        f"no parity verdict: the process with the unmodified model failed ({last_line})"
    )


def _shared_steps(ours: list[int], theirs: list[int]) -> int:
    """Steps that both took from the same tokens: up to and with the first that differs."""
    for step, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            return step + 1
    return min(len(ours), len(theirs))


def _largest_gap(ours_TV: torch.Tensor, theirs_TV: torch.Tensor) -> float:
    """Largest difference; 0 where both are NaN or the same infinity, infinite where one is."""
    if ours_TV.shape != theirs_TV.shape:
        return float("inf")
    same = (ours_TV == theirs_TV) | (ours_TV.isnan() & theirs_TV.isnan())
    gaps = (ours_TV - theirs_TV).abs().masked_fill(same, 0.0)
    return float(gaps.nan_to_num(nan=float("inf")).max())


def _difference(index: int, ours: list[int], theirs: list[int], gap: float) -> str:
    for step, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            return f"token {step} of prompt {index} is {a} and should be {b}"
    if len(ours) != len(theirs):
        return f"prompt {index} has {len(ours)} new tokens and should have {len(theirs)}"
    return f"logits of prompt {index} differ by up to {gap:.3g}" if gap else ""
