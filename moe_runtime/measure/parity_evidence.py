"""What a rank has to show for a check, as bytes that travel."""

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from moe_runtime.measure.completion import Completion
from moe_runtime.measure.forced import ForcedLogits
from moe_runtime.measure.prompt import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityEvidence:
    """Completions to compare with the unmodified model's, and logits along given tokens."""

    greedy: list[Completion]
    forced: list[ForcedLogits]

    def to_bytes(self) -> bytes:
        """`from_bytes` makes an equal one of it."""
        file = io.BytesIO()
        torch.save(asdict(self), file)
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> "ParityEvidence":
        found = torch.load(io.BytesIO(data), weights_only=True)
        return cls(
            greedy=[
                Completion(**one | {"prompt": Prompt(**one["prompt"])}) for one in found["greedy"]
            ],
            forced=[ForcedLogits(**one) for one in found["forced"]],
        )

    @classmethod
    def merged(cls, parts: Sequence["ParityEvidence"]) -> "ParityEvidence":
        """Of several ranks, in the order of prompts."""
        greedy = [one for part in parts for one in part.greedy]
        return cls(
            greedy=sorted(greedy, key=lambda one: one.prompt.index),
            forced=[one for part in parts for one in part.forced],
        )
