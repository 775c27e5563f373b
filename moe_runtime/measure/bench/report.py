"""What an offload benchmark found."""

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from moe_runtime.measure.bench.gate import Gate
from moe_runtime.measure.spread import Spread


class Caps(StrEnum):
    """Whether memory was equal: `impossible` where control groups cannot be made."""

    ENFORCED = "enforced"
    NOT_NEEDED = "not needed"
    IMPOSSIBLE = "impossible"


class Outcome(StrEnum):
    """How a contestant fared; only `measured` has a speed."""

    MEASURED = "measured"
    RED = "gate red"
    TOO_LITTLE_MEMORY = "too little memory"
    FAILED = "failed"
    ABSENT = "absent"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One contestant at one residency. Fields that say nothing about it are None.

    `times_ours` is its time over ours, paired round by round. `own_bytes` is what the process held
    after its imports, and `cap_bytes` includes it. `bytes_read_per_token` is what the block layer
    read for the process; hit rate and bytes missed are ours alone.
    """

    name: str
    title: str
    outcome: Outcome
    note: str = ""
    ms_per_token: Spread | None = None
    num_tokens: int = 0
    times_ours: Spread | None = None
    bytes_read_per_token: float | None = None
    gate: Gate | None = None
    own_bytes: int | None = None
    cap_bytes: int | None = None
    peak_memory_bytes: int | None = None
    peak_resident_bytes: int | None = None
    hit_rate: float | None = None
    bytes_missed_per_token: float | None = None
    bytes_read_over_missed: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceiling:
    """What the disk and the dense layers alone would take; or a GPU's link, and a resident step.

    Bytes missed over the rate of direct reads, or of pinned copies, right before and after the same
    turn; plus the step with the experts as a no-op, on a GPU with all of them there: nothing hides
    behind other time.
    """

    ms_per_token: Spread
    ratio: Spread


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What the cache simulator says of the very rows that were replayed; simulated, not measured.

    `ms_per_token` is simulated bytes missed over the rate of direct reads beside the turns, plus
    the no-op step.
    """

    hit_rate: float
    ms_per_token: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """One residency with one routing."""

    residency: float
    routing: str
    totals: str
    caps: Caps
    weight_bytes: int
    rows: list[Row]
    no_experts_ms: Spread
    device: str
    resident_ms: Spread | None  # on a GPU: transformers with all experts there
    direct_read_gbps: Spread | None  # on the CPU, beside our counted turns
    direct_reads: list[dict[str, Any]]  # medians by setting
    link_gbps: Spread | None  # on a GPU: copies of pinned memory beside our counted turns
    ceiling: Ceiling | None
    prediction: Prediction | None
    num_rounds: int
    tokens_per_round: int
    other_cores: float  # kept busy by other programs during the rounds, on average

    @property
    def ours(self) -> Row:
        return self.rows[0]

    def as_dict(self) -> dict[str, Any]:
        """`capped` is null when everybody may hold all weights."""
        capped = {Caps.ENFORCED: True, Caps.IMPOSSIBLE: False, Caps.NOT_NEEDED: None}[self.caps]
        return {"capped": capped, **asdict(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two routings at one residency: how much faster ours is with the second."""

    residency: float
    slow: str
    fast: str
    measured: float
    predicted: float

    @property
    def is_as_predicted(self) -> bool:
        return abs(self.measured / self.predicted - 1) <= 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All tables of a run, and what they were measured with."""

    command: str
    machine: dict[str, Any]
    versions: dict[str, str]
    commit: str | None
    model: dict[str, Any]
    tables: list[Table]
    comparisons: list[Comparison]

    @property
    def is_green(self) -> bool:
        """Whether ours ran in every table and every gate held."""
        return all(
            table.ours.outcome is Outcome.MEASURED
            and all(row.outcome is not Outcome.RED for row in table.rows)
            for table in self.tables
        )

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        comparisons = [
            {**asdict(found), "is_within_10_percent": found.is_as_predicted}
            for found in self.comparisons
        ]
        return {
            "is_green": self.is_green,
            "command": self.command,
            "machine": self.machine,
            "versions": self.versions,
            "commit": self.commit,
            "model": self.model,
            "tables": [table.as_dict() for table in self.tables],
            "comparisons": comparisons,
        }
