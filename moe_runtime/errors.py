"""Everything that moe_runtime raises on purpose."""


class MoERuntimeError(Exception):
    """Root of the project's errors; the message names the thing, the value and the remedy."""


class BudgetError(MoERuntimeError, ValueError):
    """The memory asked for experts is malformed, or below what the model needs."""


class DeviceMemoryError(MoERuntimeError, MemoryError):
    """A device has less free memory than was asked of it."""

    def __init__(self, asked_bytes: int, free_bytes: int) -> None:
        super().__init__(
            f"{asked_bytes} bytes of device memory were asked for and {free_bytes} are free"
        )
        self.asked_bytes = asked_bytes
        self.free_bytes = free_bytes


class PinningError(MoERuntimeError, OSError):
    """The system does not let a device reach host memory by itself."""


class CheckpointError(MoERuntimeError):
    """A checkpoint is missing, damaged, or does not hold what its model needs."""


class ExpertReadError(MoERuntimeError, OSError):
    """An expert's bytes could not be read, or a file in use changed after it was opened."""


class UnsupportedModelError(MoERuntimeError, ValueError):
    """The model has no experts that can be offloaded, or needs something not supported yet."""


class OffloadedExpertsError(MoERuntimeError, RuntimeError):
    """An operation needs all experts in memory, and they are offloaded."""


class ParityError(MoERuntimeError):
    """Outputs differ from the unmodified model's, or the two could not be compared."""


class TraceError(MoERuntimeError, ValueError):
    """A routing trace is damaged, incomplete, or contradicts itself."""


class PredictorError(MoERuntimeError, ValueError):
    """A predictor cannot be fitted, is damaged, or belongs to another model."""


class ContestantError(MoERuntimeError):
    """A contestant of a benchmark failed; `is_memory` says that its memory was too little."""

    def __init__(self, message: str, *, is_memory: bool) -> None:
        super().__init__(message)
        self.is_memory = is_memory


class ConfigError(MoERuntimeError, ValueError):
    """A configuration file is damaged, incomplete, or holds what cannot be."""


class ProbeError(MoERuntimeError):
    """This machine cannot be measured as asked."""


class MissingPackageError(MoERuntimeError, ImportError):
    """An optional package is not installed; the message holds the command that installs it."""


class PlacementError(MoERuntimeError, ValueError):
    """A placement, or the problem it should solve, is damaged, contradictory or infeasible."""


class ParallelError(MoERuntimeError, RuntimeError):
    """Ranks cannot meet, disagree, or have lost each other."""


class BatchError(MoERuntimeError, ValueError):
    """A batch file cannot be read, or its results cannot be written."""
