"""What a batch run is asked for, and what it tells."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from moe_runtime.offline.request import BadLine


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRequest:
    """What to run, and in how much memory; the arguments of `load()` mean what they mean there."""

    model: str
    requests: Path
    results: Path
    max_tokens: int
    temperature: float
    seed: int
    expert_memory: str = "auto"
    dense_memory: str = "auto"
    kv_memory: str = "auto"
    max_sequences: int = 512
    token_groups: str = "auto"
    expert_dtype: str = "auto"
    page_cache: bool = False
    dtype: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False


class Listener(Protocol):
    """Hears what happens while it happens."""

    def on_loading(self, done: int, total: int) -> None:
        """So many tensors of the dense weights are loaded."""

    def on_loaded(self, placement: str) -> None:
        """The model is ready; `placement` says in one line what lives where."""

    def on_bad_line(self, bad: BadLine) -> None:
        """A line cannot run."""

    def on_warning(self, sentence: str) -> None:
        """Something is slower or otherwise than it could be."""

    def on_lines(self, done: int, total: int, eta_seconds: float) -> None:
        """So many lines have finished; the others take so long if all write all that they may."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRun:
    """What a run did. `report` holds passes, memory and paths; None if nothing was left to do."""

    num_lines: int
    num_finished: int  # by this run
    num_failed: int  # lines that cannot run, reported by this run or before
    num_skipped: int  # finished by an earlier run
    prompt_tokens: int
    new_tokens: int
    seconds: float  # of the passes
    load_seconds: float
    report: dict[str, Any] | None

    @property
    def new_tokens_per_second(self) -> float | None:
        return self.new_tokens / self.seconds if self.seconds else None

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        return asdict(self) | {"new_tokens_per_second": self.new_tokens_per_second}
