"""Everything that moe_runtime raises on purpose."""


class MoERuntimeError(Exception):
    """Root of the project's errors; the message names the thing, the value and the remedy."""


class BudgetError(MoERuntimeError, ValueError):
    """The memory asked for experts is malformed, or below what the model needs."""


class CheckpointError(MoERuntimeError):
    """A checkpoint is missing, damaged, or does not hold what its model needs."""


class ExpertReadError(MoERuntimeError, OSError):
    """An expert's bytes could not be read, or its file changed after it was opened."""


class UnsupportedModelError(MoERuntimeError, ValueError):
    """The model has no experts that can be offloaded, or needs something not supported yet."""


class OffloadedExpertsError(MoERuntimeError, RuntimeError):
    """An operation needs all experts in memory, and they are offloaded."""


class ParityError(MoERuntimeError):
    """Outputs differ from the unmodified model's, or the two could not be compared."""
