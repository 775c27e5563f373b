"""What a contestant is told before it loads, as it crosses to its process."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One model and the memory for it.

    `memory_bytes` is for weights and buffers on `device`, on the CPU over what the process holds
    after its imports; None is as much as it likes. `scratch` is a folder of the contestant's own,
    on the disk of the checkpoint. `policy`, `predictor` and `exact` are load()'s. `replay` is a
    trace whose rows take the place of the router's choice.
    """

    checkpoint: Path
    gguf: Path | None
    scratch: Path
    replay: Path | None
    device: str
    dtype: str
    policy: str
    predictor: str
    exact: bool
    num_threads: int
    memory_bytes: int | None
    context_tokens: int

    def as_message(self) -> dict[str, Any]:
        return {
            key: str(value) if isinstance(value, Path) else value
            for key, value in asdict(self).items()
        }

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> "Job":
        paths = {
            key: None if message[key] is None else Path(message[key])
            for key in ("checkpoint", "gguf", "scratch", "replay")
        }
        return cls(**message | paths)
