"""What stands between the two products of an expert: gate and up become one."""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (Triton's language has no types of Python's.)

from dataclasses import dataclass
from typing import Literal, get_args

import triton
import triton.language as tl

from moe_runtime.kernels.launch import UnsupportedKernelError

Activation = Literal["silu", "gelu_tanh", "clamped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """`h = act(gate) * up`, computed in float32.

    - "silu": `gate * sigmoid(gate) * up` (SwiGLU, arXiv 2002.05202, equation 6).
    - "gelu_tanh": GELU by its tanh approximation (arXiv 1606.08415, section 2).
    - "clamped": gpt-oss: `g * sigmoid(alpha * g) * (u + 1)` with g at most `limit` and u within
      -`limit` and `limit`. The other two ignore `alpha` and `limit`.

    `is_interleaved`: gate and up are the even and odd weight rows, and not the first and second
    half of them.
    """

    activation: Activation = "silu"
    is_interleaved: bool = False
    alpha: float = 1.702
    limit: float = 7.0

    def __post_init__(self) -> None:
        if self.activation not in get_args(Activation):
            raise UnsupportedKernelError(
                f"activation is {self.activation!r}; supported: {', '.join(get_args(Activation))}"
            )


@triton.jit
def apply_gate(gate, up, alpha, limit, ACTIVATION: tl.constexpr):
    """float32 in, float32 out; a NaN stays one."""
    if ACTIVATION == "silu":
        return gate / (1.0 + tl.exp(-gate)) * up
    elif ACTIVATION == "gelu_tanh":
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        return gate / (1.0 + tl.exp(-2.0 * inner)) * up  # (1 + tanh z) / 2 = 1 / (1 + exp(-2z))
    else:
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
        return gate / (1.0 + tl.exp(-alpha * gate)) * (up + 1.0)
