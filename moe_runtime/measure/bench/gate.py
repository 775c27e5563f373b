"""The gate before any speed is printed: do two contestants compute the same?"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Of the most likely successors so many must agree: a token in five may have nearly tied experts.
_TOP_1 = 0.8

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """How the logits of one contestant compare with eager transformers'.

    A token's error is the norm of its difference over the norm of its logits: `relative_error` is
    the median over tokens, `worst_error` the largest. `same_top_1` is the share of tokens whose
    most likely successor agrees.
    """

    is_green: bool
    is_bit_equal: bool
    relative_error: float
    worst_error: float
    tolerance: float
    same_top_1: float
    num_tokens: int

    def text(self) -> str:
        """`bits`, or the error and the agreement, or what is wrong."""
        if self.is_bit_equal:
            return "equal bits"
        said = (
            f"error {self.relative_error:.1e} (worst {self.worst_error:.1e}), "
            f"top-1 {self.same_top_1:.0%}"
        )
        if self.is_green:
            return said
        wanted = (
            f"at most {self.tolerance:.0e} and {_TOP_1:.0%}" if self.tolerance else "equal bits"
        )
        return f"RED: {said}, wanted {wanted}"


def compare_logits(found_TV: Logits, expected_TV: Logits, *, tolerance: float) -> Gate:
    """Compare as many tokens as both have. `tolerance` 0 asks for equal bits.

    Of a contestant that computes in another order the bits cannot agree; the error then is of
    bfloat16's size, and each gets the tolerance stated in `peers/catalog.py`. It is for the median:
    where two experts are nearly tied, rounding decides which one a token uses, and that token's
    error says nothing of the rest. A wrong tensor moves every token.
    """
    num_tokens = min(len(found_TV), len(expected_TV))
    if num_tokens == 0 or found_TV.shape[1] != expected_TV.shape[1]:
        raise ValueError(
            f"logits of shape {found_TV.shape} cannot be compared with {expected_TV.shape}; "
            "both must have tokens, and the same vocabulary"
        )
    found_TV, expected_TV = found_TV[:num_tokens], expected_TV[:num_tokens]
    is_bit_equal = np.array_equal(found_TV, expected_TV)
    scale_T = np.maximum(np.linalg.norm(expected_TV, axis=1), np.finfo(np.float32).tiny)
    errors_T = np.linalg.norm(found_TV - expected_TV, axis=1) / scale_T
    finite = bool(np.isfinite(errors_T).all())
    # JSON has no infinity
    median, worst = (float(np.median(errors_T)), float(errors_T.max())) if finite else (1e9, 1e9)
    same_top_1 = float((found_TV.argmax(1) == expected_TV.argmax(1)).mean())
    return Gate(
        is_green=is_bit_equal or (finite and median < tolerance and same_top_1 >= _TOP_1),
        is_bit_equal=is_bit_equal,
        relative_error=median,
        worst_error=worst,
        tolerance=tolerance,
        same_top_1=same_top_1,
        num_tokens=num_tokens,
    )
