"""What an offload benchmark is to measure, and who hears how far it has come."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_runtime.measure.bench.routing import Routing
from moe_runtime.measure.peers.catalog import Contestant


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What to run. Contestants compute on `device`, whose memory is what they lack.

    `num_steps` are tokens a contestant and table, `seconds` a table's rounds.

    `no_gguf` says why `gguf` is None.
    """

    device: torch.device
    checkpoint: Path
    gguf: Path | None
    no_gguf: str
    work_folder: Path
    residencies: Sequence[float]
    routings: Sequence[Routing]
    peers: Sequence[Contestant]
    num_steps: int
    seconds: float
    equal_totals: bool
    policy: str
    predictor: str
    exact: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Hears of every stage, and of rounds done and to do in the present one."""

    on_stage: Callable[[str], None] = lambda text: None
    on_round: Callable[[int, int], None] = lambda done, total: None
