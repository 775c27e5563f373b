"""Streams, events and memory of a CUDA device."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from moe_runtime.errors import DeviceMemoryError, PinningError
from moe_runtime.memory.stream import Event, Stream

_HIGH_PRIORITY, _LOW_PRIORITY = -1, 0  # CUDA counts downwards


@dataclass(frozen=True, slots=True)
class CudaEvent:
    """One recorded event."""

    event: torch.cuda.Event

    def is_done(self) -> bool:
        return bool(self.event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        self.event.synchronize()  # sync: the caller counts it

    def seconds_since(self, start: Event) -> float:
        assert isinstance(start, CudaEvent)
        return float(start.event.elapsed_time(self.event)) / 1e3


@dataclass(frozen=True, slots=True)
class CudaStream:
    """One CUDA stream. `is_current` says that torch launches there without being told."""

    stream: torch.cuda.Stream
    is_current: bool

    def launch(self, kernel: Callable[[], object]) -> None:
        if self.is_current:
            kernel()
            return
        with torch.cuda.stream(self.stream):
            kernel()

    def copy_async(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self.launch(lambda: target.copy_(source, non_blocking=True))

    def record(self, *, is_timed: bool = False) -> CudaEvent:
        event = torch.cuda.Event(enable_timing=is_timed)  # type: ignore[no-untyped-call]
        event.record(self.stream)
        return CudaEvent(event)

    def wait_event(self, event: Event) -> None:
        assert isinstance(event, CudaEvent)
        self.stream.wait_event(event.event)  # sync: of streams, the host goes on

    def synchronize(self) -> None:
        self.stream.synchronize()  # sync: the caller says why


class CudaStreams:
    """The model's own stream, which torch calls current, and two for copies.

    Pins memory by registering it in place: torch's allocator of pinned memory rounds a slab up to
    the next power of two.
    """

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        self.demand: Stream = _side_stream(self.device, _HIGH_PRIORITY)
        self.prefetch: Stream = _side_stream(self.device, _LOW_PRIORITY)

    def compute(self) -> Stream:
        return CudaStream(torch.cuda.current_stream(self.device), True)

    def allocate(self, num_bytes: int) -> torch.Tensor:
        try:
            return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError as error:
            raise DeviceMemoryError(num_bytes, self.free_bytes()) from error

    def free_bytes(self) -> int:
        torch.cuda.empty_cache()  # what torch keeps for later counts as free
        return int(torch.cuda.mem_get_info(self.device)[0])

    def pin(self, memory: torch.Tensor) -> None:
        with torch.cuda.device(self.device):
            status = _runtime().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
        if int(status) != 0:
            self._forget_error()
            raise PinningError(str(_runtime().cudaGetErrorString(status)))

    def unpin(self, memory: torch.Tensor) -> None:
        _runtime().cudaHostUnregister(memory.data_ptr())

    def _forget_error(self) -> None:
        """The runtime reports a refusal once more, at the next launch of anybody's kernel."""
        try:
            torch.zeros(1, device=self.device)
        except RuntimeError:
            pass  # it was reported here

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)  # sync: the caller says why


def _side_stream(device: torch.device, priority: int) -> CudaStream:
    return CudaStream(torch.cuda.Stream(device, priority=priority), False)  # type: ignore[no-untyped-call]


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
