"""What the tiers of expert memory need of an accelerator: streams, events, memory, pinning."""

from collections.abc import Callable
from typing import Protocol

import torch


class Event(Protocol):
    """A point in the order of one stream."""

    def is_done(self) -> bool:
        """Whether the stream has come past it. Never blocks."""

    def wait(self) -> None:
        """Block the host until it has."""

    def seconds_since(self, start: "Event") -> float:
        """Time between two events recorded with `is_timed`, both of them done."""


class Stream(Protocol):
    """A queue of work: in order within itself, in any order with other streams."""

    def launch(self, kernel: Callable[[], object]) -> None:
        """Queue what `kernel` launches. It runs on the host now, or later in the stream's order."""

    def copy_async(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy between host and device. Both must live until it is done."""

    def record(self, *, is_timed: bool = False) -> Event:
        """An event behind everything queued so far."""

    def wait_event(self, event: Event) -> None:
        """What is queued from now on runs after `event`. Never blocks the host."""

    def synchronize(self) -> None:
        """Block the host until everything queued is done."""


class Streams(Protocol):
    """One device, and the streams on which experts travel to it.

    `demand` carries what a layer waits for, `prefetch` what may be wanted later. The device's
    scheduler prefers `demand`; two copies that share one copy engine are still done in order.
    """

    device: torch.device
    demand: Stream
    prefetch: Stream

    def compute(self) -> Stream:
        """The stream on which the calling thread launches the model's kernels."""

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Bytes on the device (uint8). Raises DeviceMemoryError."""

    def free_bytes(self) -> int:
        """Device memory that may still be allocated."""

    def pin(self, memory: torch.Tensor) -> None:
        """Let the device reach host `memory` by itself. Raises PinningError."""

    def unpin(self, memory: torch.Tensor) -> None:
        """Undo `pin`, once no copy uses `memory` any more."""

    def synchronize(self) -> None:
        """Block the host until the device is idle, whoever gave it work."""
