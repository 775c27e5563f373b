"""A routing trace: which experts every token used, layer by layer.

N tokens, L MoE layers, K experts a token, E experts a layer, D model dim.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moe_runtime.trace_fields import FIELDS, SCALARS, Array, Phase, complete_fields
from moe_runtime.trace_file import Member, read_npz, write_npz

__all__ = ["Phase", "Trace"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """One row is one token of one forward; rows of one forward share a `step` and stand together.

    Built by `of`, `load` or a TraceWriter, which check it. Layer `l` is the `l`-th MoE layer, as in
    an ExpertKey; `layer_ids[l]` is where it stands among all `num_hidden_layers`. Padding rows are
    kept, as they use experts too.
    """

    topk: Array  # [N, L, K] int16, largest weight first where the recorder knew; -1: missing
    weights: Array | None  # [N, L, K] float16; 0 where topk is -1
    token_id: Array | None  # [N] int32, what went in; -1: unknown
    sequence_id: Array  # [N] int32
    position: Array  # [N] int32 within the sequence; -1 for padding
    phase: Array  # [N] uint8, a Phase
    step: Array  # [N] int64, never decreasing
    domain: Array | None  # [N] text, such as "code"; "" unknown
    gate_probs: Array | None  # [N, L, E] float16
    hidden: Array | None  # [N, L, D] float16, what the routers saw
    num_experts: int
    num_hidden_layers: int
    layer_ids: tuple[int, ...]
    model: str
    checkpoint: str  # digest of the model's weights; "" unknown

    @classmethod
    def of(
        cls, fields: Mapping[str, Any], *, source: str = "trace", num_experts: int | None = None
    ) -> "Trace":
        """From at least a `topk`; raises TraceError. See `complete_fields` for what is inferred."""
        return cls(**complete_fields(fields, source=source, num_experts=num_experts))

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        num_experts: int | None = None,
        leave_out: Collection[str] = (),
    ) -> "Trace":
        """From an `.npz`; raises TraceError. `leave_out` names fields to skip, such as hidden."""
        fields = read_npz(Path(path), leave_out)
        return cls.of(fields, source=f"trace {path}", num_experts=num_experts)

    def save(self, path: str | Path) -> None:
        """Write a compressed `.npz`, under its name only once it is whole."""
        arrays = [Member.of(name, value) for name, value in self.arrays().items()]
        scalars = [Member.of(name, getattr(self, name)) for name in SCALARS]
        write_npz(Path(path), arrays + scalars)

    def arrays(self) -> dict[str, Array]:
        """The fields with one row a token, by name, without those that are not there."""
        return {name: getattr(self, name) for name in FIELDS if getattr(self, name) is not None}

    def select(self, rows: Array) -> "Trace":
        """Only `rows`, a mask or indices; in the order of the trace either way."""
        indices = np.flatnonzero(rows) if rows.dtype == np.bool_ else np.sort(rows)
        return replace(self, **{name: array[indices] for name, array in self.arrays().items()})

    @property
    def num_tokens(self) -> int:
        return int(self.topk.shape[0])

    @property
    def num_layers(self) -> int:
        return int(self.topk.shape[1])

    @property
    def top_k(self) -> int:
        return int(self.topk.shape[2])

    @property
    def num_steps(self) -> int:
        return int(np.count_nonzero(np.diff(self.step))) + min(1, self.num_tokens)
