"""Looks at a machine and says what would keep the runtime from working well, and what to do."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from moe_runtime.measure.check import Check, Status
from moe_runtime.measure.hardware_checks import (
    check_cpu,
    check_disk,
    check_gpu,
    check_memlock,
    check_memory,
)
from moe_runtime.measure.software_checks import (
    check_kernels,
    check_optional_packages,
    check_packages,
    check_python,
)

_RATE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All the checks of one machine and one folder."""

    checks: tuple[Check, ...]

    @property
    def status(self) -> Status:
        order = list(Status)
        return max((check.status for check in self.checks), key=order.index)

    def as_dict(self) -> dict[str, object]:
        """What `--json` prints."""
        return {"status": self.status, "checks": [asdict(check) for check in self.checks]}


def diagnose(folder: Path, *, rate_seconds: float = _RATE_SECONDS) -> Diagnosis:
    """Look at this machine and at the file system under `folder`. Takes `rate_seconds` and a bit.

    No check raises: what goes wrong inside one is its finding.
    """
    looks: tuple[Callable[[], Check | list[Check]], ...] = (
        check_python,
        check_packages,
        check_cpu,
        check_memory,
        check_memlock,
        lambda: check_disk(folder, seconds=rate_seconds),
        check_gpu,
        check_kernels,
        check_optional_packages,
    )
    checks: list[Check] = []
    for look in looks:
        found = look()
        checks += found if isinstance(found, list) else [found]
    return Diagnosis(tuple(checks))
