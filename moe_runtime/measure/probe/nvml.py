"""Facts about NVIDIA GPUs that their driver tells through NVML."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, TypeVar

T = TypeVar("T")


class NvmlDevice:
    """One GPU. What its driver does not support is None."""

    def __init__(self, nvml: ModuleType, handle: Any) -> None:
        self._nvml = nvml
        self._handle = handle

    @property
    def name(self) -> str:
        return str(self._nvml.nvmlDeviceGetName(self._handle))

    @property
    def memory_bytes(self) -> int:
        return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).total)

    @property
    def compute_capability(self) -> str:
        major, minor = self._nvml.nvmlDeviceGetCudaComputeCapability(self._handle)
        return f"{major}.{minor}"

    @property
    def sm_clock_mhz(self) -> int | None:
        """The highest the multiprocessors may run at."""
        return self._ask(self._nvml.nvmlDeviceGetMaxClockInfo, self._nvml.NVML_CLOCK_SM)

    @property
    def memory_clock_mhz(self) -> int | None:
        """The highest the memory may run at."""
        return self._ask(self._nvml.nvmlDeviceGetMaxClockInfo, self._nvml.NVML_CLOCK_MEM)

    @property
    def power_limit_watts(self) -> float | None:
        milliwatts: int | None = self._ask(self._nvml.nvmlDeviceGetEnforcedPowerLimit)
        return None if milliwatts is None else milliwatts / 1000

    def pcie_link(self) -> tuple[int | None, int | None]:
        """(generation, lanes) at this moment: an idle link sleeps in a lower generation."""
        return (
            self._ask(self._nvml.nvmlDeviceGetCurrPcieLinkGeneration),
            self._ask(self._nvml.nvmlDeviceGetCurrPcieLinkWidth),
        )

    def _ask(self, function: Callable[..., T], *arguments: object) -> T | None:
        try:
            return function(self._handle, *arguments)
        except self._nvml.NVMLError:
            return None


class Nvml:
    """The driver, open."""

    def __init__(self, nvml: ModuleType) -> None:
        self._nvml = nvml
        self.driver = str(nvml.nvmlSystemGetDriverVersion())

    def devices(self) -> list[NvmlDevice]:
        """All GPUs, whether or not CUDA_VISIBLE_DEVICES hides them from CUDA."""
        count = self._nvml.nvmlDeviceGetCount()
        handles = [self._nvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
        return [NvmlDevice(self._nvml, handle) for handle in handles]

    def device(self, uuid: str) -> NvmlDevice | None:
        """The GPU with the identity that CUDA gives it; None where NVML does not know it."""
        try:
            handle = self._nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        except self._nvml.NVMLError:  # a slice of a GPU goes by another name
            return None
        return NvmlDevice(self._nvml, handle)


@contextmanager
def open_nvml() -> Iterator[Nvml | None]:
    """The driver while the context lasts; None without nvidia-ml-py, or without a driver."""
    try:
        import pynvml
    except ImportError:
        yield None
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield Nvml(pynvml)
    finally:
        pynvml.nvmlShutdown()
