"""One call of the experts' library: its fields, stages and gates."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum, IntFlag

import torch

TorchGate = Callable[[torch.Tensor], torch.Tensor]


class Gate(IntEnum):
    """Activations that the library computes, as `enum gate` numbers them.

    With U = 2F the activation of one half is multiplied with the other; with U = F it is all.
    """

    NONE = 0
    SILU = 1
    GELU_TANH = 2
    RELU = 3
    RELU_SQUARED = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ClampedGate:
    """gpt-oss's: `g sigmoid(alpha g) (u + 1)`, g at most `limit` and u within -`limit` and it."""

    alpha: float
    limit: float


# What the library computes; any other gate is torch's.
KernelGate = Gate | ClampedGate
_CLAMPED_SILU = 5  # in `enum gate`


class Stage(IntFlag):
    """Parts of a call, as `enum stage` numbers them."""

    UP = 1
    GATE = 2
    DOWN = 4
    SUM = 8


class Operation(ctypes.Structure):
    """`struct moe_experts`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "up", "down", "up_bias", "down_bias", "first_row", "num_rows", "token", "weight", "x",
            "up_y", "h", "y", "total", "out", "openmp",
        )),
        *((name, ctypes.c_int64) for name in (
            "num_experts", "num_all_rows", "num_tokens", "dim", "ffn", "up_rows", "next_up",
            "next_down",
        )),
        *((name, ctypes.c_int32) for name in (
            "level", "dtype", "gate", "is_interleaved", "is_in_parts", "stages",
        )),
        ("alpha", ctypes.c_float),
        ("limit", ctypes.c_float),
    )  # fmt: skip

    def set_gate(self, gate: KernelGate) -> None:
        if isinstance(gate, ClampedGate):
            self.gate, self.alpha, self.limit = _CLAMPED_SILU, gate.alpha, gate.limit
        else:
            self.gate = gate
