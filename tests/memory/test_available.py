"""The memory a process may take is the least that the machine and its control groups allow."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from moe_runtime.memory import available
from moe_runtime.memory.available import available_memory_bytes, cgroup_limit_bytes

GIB = 2**30
V1_NO_LIMIT = 9223372036854771712  # what the kernel writes
V1_MOUNT = "30 25 0:26 {root} /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory\n"
V2_MOUNT = "30 25 0:26 {root} /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw\n"

WriteTree = Callable[[dict[str, str]], Path]


@pytest.fixture
def write_tree(tmp_path: Path) -> WriteTree:
    """Write files under a fake `/` and return it."""

    def write_files(files: dict[str, str]) -> Path:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write_files


@pytest.fixture(autouse=True)
def machine_with_64_gib_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        available.psutil, "virtual_memory", lambda: SimpleNamespace(available=64 * GIB)
    )


def v1_group(folder: str, limit: int, usage: int, inactive: int = 0) -> dict[str, str]:
    base = f"sys/fs/cgroup/memory{folder}"
    return {
        f"{base}/memory.limit_in_bytes": f"{limit}\n",
        f"{base}/memory.usage_in_bytes": f"{usage}\n",
        f"{base}/memory.stat": f"inactive_file 7\ntotal_inactive_file {inactive}\n",
    }


def v2_group(
    folder: str, limit: int | str, usage: int, inactive: int = 0, high: int | str = "max"
) -> dict[str, str]:
    base = f"sys/fs/cgroup{folder}"
    return {
        f"{base}/memory.max": f"{limit}\n",
        f"{base}/memory.high": f"{high}\n",
        f"{base}/memory.current": f"{usage}\n",
        f"{base}/memory.stat": f"anon 5\ninactive_file {inactive}\nactive_file 9\n",
    }


def test_without_control_groups_the_machine_alone_decides(tmp_path: Path) -> None:
    assert cgroup_limit_bytes(tmp_path) is None
    assert available_memory_bytes(tmp_path) == 64 * GIB


def test_a_v2_limit_counts_less_what_is_used_and_not_reclaimable(write_tree: WriteTree) -> None:
    root = write_tree(
        {
            "proc/self/cgroup": "0::/job\n",
            "proc/self/mountinfo": V2_MOUNT.format(root="/"),
            **v2_group("/job", 8 * GIB, 3 * GIB, inactive=1 * GIB),
        }
    )
    assert cgroup_limit_bytes(root) == 8 * GIB
    assert available_memory_bytes(root) == 6 * GIB


def test_a_v2_ancestor_may_be_the_tightest(write_tree: WriteTree) -> None:
    root = write_tree(
        {
            "proc/self/cgroup": "0::/slice/job\n",
            "proc/self/mountinfo": V2_MOUNT.format(root="/"),
            **v2_group("/slice", 4 * GIB, 3 * GIB),
            **v2_group("/slice/job", 8 * GIB, 1 * GIB),
        }
    )
    assert cgroup_limit_bytes(root) == 4 * GIB
    assert available_memory_bytes(root) == 1 * GIB


def test_the_lowest_limit_need_not_leave_the_least(write_tree: WriteTree) -> None:
    """An ancestor with a larger limit that others have filled allows less than our own group."""
    root = write_tree(
        {
            "proc/self/cgroup": "0::/slice/job\n",
            "proc/self/mountinfo": V2_MOUNT.format(root="/"),
            **v2_group("/slice", 16 * GIB, 15 * GIB),
            **v2_group("/slice/job", 8 * GIB, 1 * GIB),
        }
    )
    assert cgroup_limit_bytes(root) == 8 * GIB
    assert available_memory_bytes(root) == 1 * GIB


def test_v2_high_is_a_limit_and_max_is_none(write_tree: WriteTree) -> None:
    root = write_tree(
        {
            "proc/self/cgroup": "0::/slice/job\n",
            "proc/self/mountinfo": V2_MOUNT.format(root="/"),
            **v2_group("/slice", "max", 3 * GIB),
            **v2_group("/slice/job", "max", 1 * GIB, high=2 * GIB),
        }
    )
    assert cgroup_limit_bytes(root) == 2 * GIB
    assert available_memory_bytes(root) == 1 * GIB


def test_v1_limits_of_all_ancestors_count_and_unlimited_is_none(write_tree: WriteTree) -> None:
    root = write_tree(
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/\n4:memory:/a/b\n0::/\n",
            "proc/self/mountinfo": V1_MOUNT.format(root="/"),
            **v1_group("", V1_NO_LIMIT, 50 * GIB),
            **v1_group("/a", 6 * GIB, 5 * GIB, inactive=2 * GIB),
            **v1_group("/a/b", V1_NO_LIMIT, 1 * GIB),
        }
    )
    assert cgroup_limit_bytes(root) == 6 * GIB
    assert available_memory_bytes(root) == 3 * GIB


def test_a_hybrid_machine_counts_both_hierarchies(write_tree: WriteTree) -> None:
    root = write_tree(
        {
            "proc/self/cgroup": "4:memory:/a\n0::/b\n",
            "proc/self/mountinfo": V1_MOUNT.format(root="/")
            + V2_MOUNT.format(root="/").replace("/sys/fs/cgroup ", "/sys/fs/cgroup/unified "),
            **v1_group("/a", 6 * GIB, 0),
            **v2_group("/unified/b", 5 * GIB, 0),
        }
    )
    assert cgroup_limit_bytes(root) == 5 * GIB


@pytest.mark.parametrize("own_path", ["/docker/1234", "/", "/../.."])
def test_in_a_container_the_mount_shows_our_own_group(own_path: str, write_tree: WriteTree) -> None:
    """With or without a cgroup namespace, the limit stands at the mount point itself."""
    root = write_tree(
        {
            "proc/self/cgroup": f"4:memory:{own_path}\n",
            "proc/self/mountinfo": V1_MOUNT.format(root="/docker/1234"),
            **v1_group("", 2 * GIB, GIB // 2),
        }
    )
    assert cgroup_limit_bytes(root) == 2 * GIB
    assert available_memory_bytes(root) == 3 * GIB // 2


def test_a_group_over_its_limit_leaves_nothing(write_tree: WriteTree) -> None:
    root = write_tree(
        {
            "proc/self/cgroup": "0::/job\n",
            "proc/self/mountinfo": V2_MOUNT.format(root="/"),
            **v2_group("/job", 1 * GIB, 2 * GIB),
        }
    )
    assert available_memory_bytes(root) == 0


def test_the_machine_decides_when_it_is_tighter_than_its_groups(write_tree: WriteTree) -> None:
    root = write_tree(
        {
            "proc/self/cgroup": "0::/job\n",
            "proc/self/mountinfo": V2_MOUNT.format(root="/"),
            **v2_group("/job", 1000 * GIB, 2 * GIB),
        }
    )
    assert available_memory_bytes(root) == 64 * GIB


@pytest.mark.parametrize("text", ["", "garbage\n", "0::\n", "4:memory\n"])
def test_unreadable_facts_set_no_limit(text: str, write_tree: WriteTree) -> None:
    root = write_tree({"proc/self/cgroup": text, "proc/self/mountinfo": text})
    assert cgroup_limit_bytes(root) is None


def test_on_this_machine_the_answer_is_positive_and_no_more_than_there_is() -> None:
    assert 0 < available_memory_bytes() <= 64 * GIB
