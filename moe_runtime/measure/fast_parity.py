"""Says whether a fast path is right where it rounds otherwise than unmodified transformers."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from moe_runtime.errors import ParityError

# A faster kernel may stand this much further from float32 than transformers' own rounding does ...
MAX_RATIO = 1.1
# On several ranks partial sums are rounded once more, when they travel: 1.09 on the Mixtral demo,
# top-2 on four ranks (tests/parallel/test_bfloat16_tolerance.py).
MAX_RATIO_ON_RANKS = 1.25
# ... as a root mean square over the logits of at least so many tokens.
MIN_POSITIONS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class FastParity:
    """Greedy tokens in float32, and distances of logits to a float32 run.

    `rms_distance` is ours and `eager_rms_distance` that of the unmodified model in the same dtype,
    both fed with the same tokens; None where the dtype is float32 itself. `difference` says in
    words where the tokens first differ. `expert_dtype` is load()'s: with another than "auto" our
    logits are those of rounded weights, and greedy tokens those of the weights as they are.
    """

    reference: str
    dtype: str
    tokens_compared: int
    greedy_tokens_equal: bool
    positions: int
    rms_distance: float | None
    eager_rms_distance: float | None
    difference: str = ""
    expert_dtype: str = "auto"
    max_ratio: float = MAX_RATIO

    @property
    def rms_ratio(self) -> float | None:
        """Our distance over the unmodified model's; None where there is nothing to divide by."""
        if not self.rms_distance or not self.eager_rms_distance:
            return None
        return self.rms_distance / self.eager_rms_distance

    @property
    def is_right(self) -> bool:
        """Whether both halves of the rule hold."""
        return self.greedy_tokens_equal and self.is_close

    @property
    def is_close(self) -> bool:
        """Whether our logits are no further from float32 than transformers' own."""
        if self.positions == 0:
            return self.dtype == "float32"
        if self.positions < MIN_POSITIONS or None in (self.rms_distance, self.eager_rms_distance):
            return False
        assert self.rms_distance is not None
        assert self.eager_rms_distance is not None
        return self.rms_distance <= self.max_ratio * self.eager_rms_distance

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints of it."""
        found = {key: value for key, value in asdict(self).items() if key != "difference"}
        mode = "fast" if self.expert_dtype == "auto" else f"lossy, {self.expert_dtype} experts"
        return {"mode": mode} | found | {"rms_ratio": self.rms_ratio}

    def text(self) -> str:
        """What was compared, in words."""
        tokens = f"{self.tokens_compared} greedy float32 tokens equal"
        if not self.greedy_tokens_equal:
            tokens = f"in float32 {self.difference}"
        if self.positions == 0:
            return tokens
        return f"{tokens}; {self.dtype} logits {self._distances()} over {self.positions} positions"

    def require(self) -> None:
        """Raise ParityError unless both halves of the rule hold."""
        remedy = "use --exact, and please report the model and what moe-runtime doctor prints"
        if not self.greedy_tokens_equal:
            raise ParityError(
                f"the output differs from {self.reference}: in float32 {self.difference}; {remedy}"
            )
        if not self.is_close:
            if self.positions < MIN_POSITIONS:
                raise ParityError(
                    f"no parity verdict: {self.positions} positions were compared and "
                    f"{MIN_POSITIONS} are needed; give longer prompts, or more of them"
                )
            if self.expert_dtype != "auto":
                remedy = f"{self.expert_dtype} experts are lossy: leave out --expert-dtype"
            raise ParityError(
                f"the {self.dtype} logits are {self._distances()}, and at most {self.max_ratio} "
                f"times as far is allowed; {remedy}"
            )

    def _distances(self) -> str:
        ours, eager = (
            "not finite" if value is None else f"{value:.3g}"
            for value in (self.rms_distance, self.eager_rms_distance)
        )
        return f"{ours} (rms) from a float32 run where the unmodified model's are {eager}"


def rms_distance(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float | None:
    """Root mean square over all logits `[T, V]` of all sequences; None if one is not finite."""
    squares = [
        (a.double() - b.double()).square() for a, b in zip(found, expected, strict=True) if len(a)
    ]
    total = sum(float(s.sum()) for s in squares)
    count = sum(s.numel() for s in squares)
    distance = float((total / count) ** 0.5) if count else 0.0
    return distance if distance < float("inf") else None
