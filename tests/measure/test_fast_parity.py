"""The rule of the fast path: float32 tokens equal, bf16 logits no further off than eager's."""

from dataclasses import replace

import pytest
import torch

from moe_runtime.errors import ParityError
from moe_runtime.measure.fast_parity import MAX_RATIO, MIN_POSITIONS, FastParity, rms_distance


def parity(
    *,
    equal: bool = True,
    positions: int = MIN_POSITIONS,
    ours: float | None = 1.0,
    eager: float | None = 1.0,
    dtype: str = "bfloat16",
) -> FastParity:
    return FastParity(
        reference="transformers",
        dtype=dtype,
        tokens_compared=20,
        greedy_tokens_equal=equal,
        positions=positions,
        rms_distance=ours,
        eager_rms_distance=eager,
        difference="" if equal else "token 3 of prompt 0 is 5 and should be 6",
    )


def test_rounded_experts_are_called_lossy() -> None:
    """Law: a verdict names what was rounded, and the remedy of a bad one is to leave that out."""
    lossy = replace(parity(ours=9.0), expert_dtype="int8")
    assert parity().as_dict()["mode"] == "fast"
    assert lossy.as_dict()["mode"] == "lossy, int8 experts"
    with pytest.raises(ParityError, match="int8 experts are lossy: leave out --expert-dtype"):
        lossy.require()


def test_within_the_ratio_is_right() -> None:
    for found in (parity(), parity(ours=MAX_RATIO), parity(ours=0.0), parity(ours=0.0, eager=0.0)):
        found.require()
        assert found.is_right
    assert parity(ours=0.5).as_dict()["rms_ratio"] == 0.5
    assert parity().as_dict()["mode"] == "fast"


@pytest.mark.parametrize(
    ("found", "wording"),
    [
        (parity(equal=False), "in float32 token 3 of prompt 0 is 5 and should be 6; use --exact"),
        (parity(ours=1.2), "1.2 (rms) from a float32 run where the unmodified model's are 1,"),
        (parity(ours=None), "not finite (rms) from"),
        (parity(ours=0.1, eager=0.0), "at most 1.1 times as far"),
        (parity(positions=199), "199 positions were compared and 200 are needed"),
    ],
)
def test_anything_else_is_wrong_and_says_why(found: FastParity, wording: str) -> None:
    assert not found.is_right
    with pytest.raises(ParityError) as error:
        found.require()
    assert wording in str(error.value)


def test_float32_has_no_distance() -> None:
    found = parity(dtype="float32", positions=0, ours=None, eager=None)
    found.require()
    assert found.as_dict()["rms_ratio"] is None
    assert not parity(positions=0, ours=None, eager=None).is_right


def test_rms_distance() -> None:
    """Law: all logits of all sequences count alike."""
    zeros = [torch.zeros(1, 2), torch.zeros(3, 2)]
    ones = [torch.ones(1, 2), torch.zeros(3, 2)]
    assert rms_distance(ones, zeros) == pytest.approx(0.5)
    assert rms_distance([torch.full((1, 1), float("nan"))], [torch.zeros(1, 1)]) is None
    with pytest.raises(RuntimeError):
        rms_distance([torch.zeros(2, 2)], [torch.zeros(3, 2)])
