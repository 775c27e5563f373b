"""Control groups, one a process, that limit memory and tell how much was used at most."""

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_PREFIX = "moe-runtime-bench-"
_V1_SWAP = "memory.memsw.limit_in_bytes"  # memory and swap together
# The kernel empties a group a moment after its last process has ended.
_REMOVAL_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class _Files:
    """What the two versions of the controller call the same things."""

    limit: str
    usage: str
    peak: str
    events: str
    own: tuple[str, ...]  # lines of memory.stat: what a process cannot do without
    is_v2: bool


_V1 = _Files(
    "memory.limit_in_bytes", "memory.usage_in_bytes", "memory.max_usage_in_bytes",
    "memory.oom_control", ("total_rss", "total_mapped_file"), False,
)  # fmt: skip
_V2 = _Files(
    "memory.max", "memory.current", "memory.peak",
    "memory.events", ("anon", "file_mapped", "kernel"), True,
)  # fmt: skip


class MemoryGroup:
    """One group with the processes put into it. Page cache that they bring in counts as theirs."""

    def __init__(self, folder: Path, files: _Files) -> None:
        self.folder = folder
        self._files = files

    def add(self, process_id: int) -> None:
        """From here on what this process allocates counts here; what it had stays where it was."""
        (self.folder / "cgroup.procs").write_text(str(process_id))

    def limit(self, num_bytes: int) -> bool:
        """Cap memory. False if more is in use and cannot be given up."""
        try:
            (self.folder / self._files.limit).write_text(str(num_bytes))
        except OSError:
            return False
        if not self._files.is_v2:  # v2 has no way to forget the peak before the cap
            (self.folder / self._files.peak).write_text("0")
        # Without a cap on swap too, a machine that has some would move the excess there.
        name, value = ("memory.swap.max", 0) if self._files.is_v2 else (_V1_SWAP, num_bytes)
        with contextlib.suppress(OSError):  # a kernel that does not count swap
            (self.folder / name).write_text(str(value))
        return True

    def own_bytes(self) -> int:
        """What the processes hold that is not mere cache of files."""
        lines = (self.folder / "memory.stat").read_text().split()
        stat = dict(zip(lines[::2], lines[1::2], strict=True))
        own = sum(int(stat.get(name, 0)) for name in self._files.own)
        if not self._files.is_v2:
            own += int((self.folder / "memory.kmem.usage_in_bytes").read_text())
        return own

    def peak_bytes(self) -> int | None:
        """The most that was in use since the start, page cache included; None before Linux 5.19."""
        try:
            return int((self.folder / self._files.peak).read_text())
        except OSError:
            return None

    def was_killed(self) -> bool:
        """Whether the kernel ended a process because of the cap."""
        words = (self.folder / self._files.events).read_text().split()
        counts = dict(zip(words[::2], words[1::2], strict=True))
        return int(counts.get("oom_kill", 0)) > 0

    def remove(self) -> None:
        """Its processes must have ended."""
        deadline = time.monotonic() + _REMOVAL_SECONDS
        while True:
            try:
                self.folder.rmdir()
            except FileNotFoundError:
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
            else:
                return


class MemoryGroups:
    """A parent group; `new` makes one child a process. A context manager that removes them all.

    Processes of the children must have ended when it is left.
    """

    def __init__(self, folder: Path, files: _Files) -> None:
        self._folder = folder
        self._files = files
        self._groups: list[MemoryGroup] = []

    def new(self, name: str) -> MemoryGroup:
        folder = self._folder / f"{len(self._groups)}-{name}"
        folder.mkdir()
        group = MemoryGroup(folder, self._files)
        self._groups.append(group)
        return group

    def close(self) -> None:
        for group in self._groups:
            group.remove()
        MemoryGroup(self._folder, self._files).remove()


@contextlib.contextmanager
def memory_groups(root: Path = Path("/sys/fs/cgroup")) -> Iterator[MemoryGroups | None]:
    """Groups if this process may make them (as root, or where a v2 subtree is delegated), or None.

    `root` is where the controllers are mounted.
    """
    found = _open(root)
    try:
        yield found
    finally:
        if found is not None:
            found.close()


def _open(root: Path) -> MemoryGroups | None:
    for parent, files in _candidates(root):
        folder = parent / f"{_PREFIX}{os.getpid()}"
        try:
            _sweep(parent)
            folder.mkdir()
        except OSError:
            continue
        try:
            _prepare(folder, files)
        except OSError:
            folder.rmdir()
            continue
        return MemoryGroups(folder, files)
    return None


def _candidates(root: Path) -> list[tuple[Path, _Files]]:
    """Folders in which a group could be made, most promising first."""
    if (root / "memory" / _V1.limit).is_file():
        # The top: a group below our own could not be given more than ours has.
        return [(root / "memory", _V1)]
    own = next(
        (
            line.removeprefix("0::").lstrip("/")
            for line in _lines(Path("/proc/self/cgroup"))
            if line.startswith("0::")
        ),
        "",
    )
    # v2 keeps processes in leaves only, so the place is above our own group.
    places = [root / own, *(root / own).parents]
    return [
        (place, _V2)
        for place in places
        if place.is_relative_to(root)
        and "memory" in " ".join(_lines(place / "cgroup.subtree_control")).split()
    ]


def _prepare(folder: Path, files: _Files) -> None:
    """Make `folder` a parent, and see whether a child of it can hold and limit a process."""
    if files.is_v2:
        (folder / "cgroup.subtree_control").write_text("+memory")
    trial = folder / "trial"
    trial.mkdir()
    try:
        (trial / files.limit).write_text(str(2**40))
        descriptor = os.open(trial / "cgroup.procs", os.O_WRONLY)
        os.close(descriptor)
    finally:
        trial.rmdir()


def _sweep(parent: Path) -> None:
    """Remove what runs left behind that were killed outright."""
    for stale in parent.glob(f"{_PREFIX}*"):
        number = stale.name.removeprefix(_PREFIX)
        if number.isdigit() and not Path("/proc", number).exists():
            with contextlib.suppress(OSError):  # still in use by a worker that is ending
                for child in stale.iterdir():
                    if child.is_dir():
                        child.rmdir()
                stale.rmdir()


def _lines(path: Path) -> Sequence[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return ()
