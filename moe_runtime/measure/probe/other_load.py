"""How many cores other programs kept busy while this one measured."""

import time

import psutil

_IDLE = ("idle", "iowait", "guest", "guest_nice")  # guests are counted in user time already


class OtherLoad:
    """Counts from when it is made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._all_seconds = _busy_seconds()
        self._own_seconds = time.process_time()

    def cores(self) -> float:
        """Cores kept busy by others so far, on average; what the host took away counts too."""
        elapsed = time.perf_counter() - self._start
        own_seconds = time.process_time() - self._own_seconds
        all_seconds = _busy_seconds() - self._all_seconds
        return max(0.0, all_seconds - own_seconds) / elapsed if elapsed else 0.0


def _busy_seconds() -> float:
    times = psutil.cpu_times()._asdict()
    return float(sum(seconds for name, seconds in times.items() if name not in _IDLE))
