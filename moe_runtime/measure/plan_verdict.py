"""What trials of plans showed, kept for the next start with the same model, machine and wishes."""

import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe_runtime.config import write_whole
from moe_runtime.perf.hardware import Hardware

logger = logging.getLogger("moe_runtime")

_FORMAT = 2
_SLACK = 0.9  # of the free memory at the trials, which must be free again


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One way to load, as predicted and as measured; `arguments` are those of `load()`.

    What was planned is for the context that was asked for, what was predicted for the trial's. Both
    are None for the defaults, which no plan chose.
    """

    arguments: dict[str, Any]
    planned_tokens_per_second: float | None
    predicted_tokens_per_second: float | None
    measured_tokens_per_second: float
    step_seconds: tuple[float, ...]  # medians, one a round


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The arguments that won, and all trials. `available_bytes` were free then."""

    fingerprint: str
    available_bytes: int
    chosen: int  # among `trials`
    trials: tuple[Trial, ...]

    @property
    def winner(self) -> Trial:
        return self.trials[self.chosen]

    def as_dict(self) -> dict[str, Any]:
        """What the file holds, and `plan` of a report."""
        return {"format": _FORMAT, **asdict(self)}

    def save(self, path: Path) -> None:
        """Whole or not at all; a disk that is full must not keep a model from loading."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(self.as_dict(), indent=1, default=list) + "\n")
        except OSError as error:
            logger.warning("plan: %s is not written (%s)", path, error.strerror or error)


def fingerprint_of(checkpoint: str, machine: Hardware, wishes: dict[str, Any]) -> str:
    """Of model, machine and what was asked for: another one needs trials of its own."""
    about = {
        "checkpoint": checkpoint,
        "cpu": [machine.cpu.model, machine.cpu.physical_cores, machine.memory.total_bytes],
        "gpus": [[gpu.name, gpu.memory_bytes] for gpu in machine.gpus],
        "software": None if machine.software is None else machine.software.moe_runtime,
        "wishes": {name: str(value) for name, value in sorted(wishes.items())},
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def recall(path: Path, fingerprint: str, available_bytes: int) -> Verdict | None:
    """What `path` holds, if it is sound, of this model and machine, and as much memory is free."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.pop("format") != _FORMAT:
            raise ValueError(f"its format is not {_FORMAT}")
        trials = tuple(
            Trial(**{**trial, "step_seconds": tuple(trial["step_seconds"])})
            for trial in found.pop("trials")
        )
        verdict = Verdict(trials=trials, **found)
        if verdict.fingerprint != fingerprint:
            raise ValueError("it is of another model, machine or version, or of other arguments")
        if not 0 <= verdict.chosen < len(trials):
            raise ValueError(f"its choice {verdict.chosen} is none of its trials")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning("plan: %s is ignored (%s)", path, " ".join(str(error).split()))
        return None
    if available_bytes < _SLACK * verdict.available_bytes:
        logger.info("plan: less memory is free than at the trials; they are made again")
        return None
    return verdict
