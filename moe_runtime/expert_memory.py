"""How much memory the experts may take, as people write it."""

import re
from dataclasses import dataclass

from moe_runtime.errors import BudgetError

_UNIT_BYTES = {
    "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_EXAMPLES = "'auto', '512MiB', '8GiB', '33%', 0.33 or a number of bytes"


@dataclass(frozen=True, slots=True)
class ExpertMemory:
    """A budget for expert slots: bytes, a share of all expert bytes, or what is free.

    Exactly one of `num_bytes` and `share` is set; both are None for 'auto'.
    """

    num_bytes: int | None = None
    share: float | None = None

    @classmethod
    def parse(cls, value: "str | int | float | ExpertMemory") -> "ExpertMemory":
        """Read 'auto', '512MiB' (binary), '512MB' (decimal), '33%', a share up to 1, or bytes."""
        if isinstance(value, ExpertMemory):
            return value
        if isinstance(value, bool):
            raise BudgetError(f"expert_memory is {value!r}; write {_EXAMPLES}")
        if isinstance(value, int):
            return cls._of_bytes(value, value)
        if isinstance(value, float):
            return cls._of_share(value, value)
        text = value.strip()
        if text.lower() == "auto":
            return cls()
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%|[KMGT]?I?B)?", text, flags=re.IGNORECASE)
        if match is None:
            raise BudgetError(f"expert_memory {value!r} is not a size; write {_EXAMPLES}")
        number, unit = match.groups()
        if unit == "%":
            return cls._of_share(float(number) / 100, value)
        if unit is None and "." in number:
            return cls._of_share(float(number), value)
        return cls._of_bytes(int(float(number) * _UNIT_BYTES[(unit or "B").upper()]), value)

    @classmethod
    def _of_bytes(cls, num_bytes: int, written: object) -> "ExpertMemory":
        if num_bytes <= 0:
            raise BudgetError(f"expert_memory {written!r} is not positive; write {_EXAMPLES}")
        return cls(num_bytes=num_bytes)

    @classmethod
    def _of_share(cls, share: float, written: object) -> "ExpertMemory":
        if not 0 < share <= 1:
            raise BudgetError(
                f"expert_memory {written!r} is not a share between 0 and 1 (100%); "
                f"write {_EXAMPLES}"
            )
        return cls(share=share)

    def resolve(self, *, expert_total_bytes: int, available_bytes: int) -> int:
        """Bytes for slots: never more than all experts, and for 'auto' never more than is free."""
        if self.num_bytes is not None:
            wanted = self.num_bytes
        elif self.share is not None:
            wanted = int(self.share * expert_total_bytes)
        else:
            wanted = available_bytes
        return min(wanted, expert_total_bytes)


def format_bytes(num_bytes: int | float) -> str:
    """`num_bytes` in the largest binary unit that leaves at least 1: 5.2 MiB."""
    amount = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(amount) < 1024:
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"
