"""One finding about a machine: how it ended, what was seen, what to do."""

from dataclasses import dataclass, field
from enum import StrEnum


class Status(StrEnum):
    """How a check ended, the worse the later."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing looked at. `remedy` is empty when the status is ok; `facts` are for programs."""

    name: str
    status: Status
    finding: str
    remedy: str = ""
    facts: dict[str, object] = field(default_factory=dict)
