"""How much memory this process may still take: what is free, or less where a cgroup says so."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

# The v1 controller writes "no limit" as the largest multiple of a page below 2**63.
_V1_UNLIMITED_BYTES = 2**60


@dataclass(frozen=True, slots=True, kw_only=True)
class CgroupMemory:
    """One control group with a memory limit, this process's own or an ancestor of it."""

    path: Path
    limit_bytes: int
    usage_bytes: int
    reclaimable_bytes: int

    @property
    def available_bytes(self) -> int:
        """What may still be taken: page cache that nobody used lately is given back on demand."""
        used = max(0, self.usage_bytes - self.reclaimable_bytes)
        return max(0, self.limit_bytes - used)


def available_memory_bytes(root: Path = Path("/")) -> int:
    """The least of what the machine has free and what every control group above us still allows."""
    free = psutil.virtual_memory().available
    return min([free, *(group.available_bytes for group in limiting_cgroups(root))])


def cgroup_limit_bytes(root: Path = Path("/")) -> int | None:
    """The lowest memory limit of this process's control groups, or None where none is set."""
    return min((group.limit_bytes for group in limiting_cgroups(root)), default=None)


def limiting_cgroups(root: Path = Path("/")) -> list[CgroupMemory]:
    """Every control group (v1 and v2, own one first) that limits this process's memory.

    `root` is where `proc` and `sys` are looked up: the tests pass a folder of their own.
    """
    found = []
    for mount, path, is_v2 in _memory_hierarchies(root):
        for folder in (mount.joinpath(*path.parts[:depth]) for depth in _depths(path)):
            group = _read_v2(folder) if is_v2 else _read_v1(folder)
            if group is not None:
                found.append(group)
    return found


def _depths(path: PurePosixPath) -> range:
    """From the whole path up to the mount point itself."""
    return range(len(path.parts), -1, -1)


def _memory_hierarchies(root: Path) -> list[tuple[Path, PurePosixPath, bool]]:
    """(mount point, our path below it, is it v2) of each mounted hierarchy that counts memory."""
    v2_path, v1_path = _own_paths(root)
    hierarchies = []
    for line in _lines(root / "proc/self/mountinfo"):
        before, separator, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if not separator or len(fields) < 5 or len(kind) < 3:
            continue
        mounted, mount_point = fields[3], root / fields[4].lstrip("/")
        if kind[0] == "cgroup2" and v2_path is not None:
            hierarchies.append((mount_point, _below(v2_path, mounted), True))
        elif kind[0] == "cgroup" and "memory" in kind[2].split(",") and v1_path is not None:
            hierarchies.append((mount_point, _below(v1_path, mounted), False))
    return hierarchies


def _own_paths(root: Path) -> tuple[str | None, str | None]:
    """This process's path in the v2 hierarchy and in the v1 memory hierarchy."""
    v2_path = v1_path = None
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            v2_path = path
        elif "memory" in controllers.split(","):
            v1_path = path
    return v2_path, v1_path


def _below(path: str, mounted: str) -> PurePosixPath:
    """`path` as seen from a mount of the subtree `mounted`; the mount itself if it lies elsewhere.

    In a container the mount often shows only the container's own group, and `path` may be written
    from the host's point of view, or with `..` for what lies above the namespace.
    """
    own, shown = PurePosixPath("/", path), PurePosixPath("/", mounted)
    if ".." in own.parts or not own.is_relative_to(shown):
        return PurePosixPath()
    return own.relative_to(shown)


def _read_v2(folder: Path) -> CgroupMemory | None:
    # Above `high` the kernel throttles a process until it stands still: it is a limit too.
    limits = [_number(folder / name) for name in ("memory.max", "memory.high")]
    known = [limit for limit in limits if limit is not None]
    usage = _number(folder / "memory.current")
    if not known or usage is None:
        return None
    return CgroupMemory(
        path=folder,
        limit_bytes=min(known),
        usage_bytes=usage,
        reclaimable_bytes=_statistic(folder / "memory.stat", "inactive_file"),
    )


def _read_v1(folder: Path) -> CgroupMemory | None:
    limit = _number(folder / "memory.limit_in_bytes")
    usage = _number(folder / "memory.usage_in_bytes")
    if limit is None or limit >= _V1_UNLIMITED_BYTES or usage is None:
        return None
    return CgroupMemory(
        path=folder,
        limit_bytes=limit,
        usage_bytes=usage,
        reclaimable_bytes=_statistic(folder / "memory.stat", "total_inactive_file"),
    )


def _number(path: Path) -> int | None:
    """The file's one number; None for `max`, or where there is no such file."""
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].strip().isdigit() else None


def _statistic(path: Path, name: str) -> int:
    for line in _lines(path):
        key, _, value = line.partition(" ")
        if key == name and value.strip().isdigit():
            return int(value)
    return 0


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:  # not Linux, not mounted, or not ours to read: then it sets no limit we can see
        return []
