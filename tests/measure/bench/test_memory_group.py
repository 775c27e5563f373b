"""A control group caps its process, tells that the cap killed it, and is gone afterwards."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_runtime.measure.bench.memory_group import MemoryGroups, memory_groups

MIB = 2**20
# Takes megabytes on demand, page by page.
HOLD = "import sys; held = [bytes([1]) * (int(line) << 20) for line in sys.stdin]"


@pytest.fixture
def groups() -> Iterator[MemoryGroups]:
    with memory_groups() as found:
        if found is None:
            pytest.skip("this process may not make control groups")
        yield found


def hold(groups: MemoryGroups, megabytes: int, limit_bytes: int) -> tuple[int, int | None, bool]:
    """(exit code, peak, killed by the cap) of a process that takes `megabytes`."""
    group = groups.new("hold")
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, text=True)
    group.add(process.pid)
    assert group.limit(limit_bytes)
    process.communicate(f"{megabytes}\n")
    return process.returncode, group.peak_bytes(), group.was_killed()


def test_a_process_within_its_cap_lives(groups: MemoryGroups) -> None:
    code, peak, was_killed = hold(groups, 40, 100 * MIB)
    assert code == 0
    assert not was_killed
    assert peak is not None
    assert 40 * MIB <= peak <= 100 * MIB


def test_a_process_beyond_its_cap_is_killed_and_that_shows(groups: MemoryGroups) -> None:
    code, _, was_killed = hold(groups, 200, 60 * MIB)
    assert code == -9
    assert was_killed


def test_a_cap_below_what_is_held_is_refused(groups: MemoryGroups) -> None:
    group = groups.new("late")
    process = subprocess.Popen(
        [sys.executable, "-c", f"import sys; held = bytes([1]) * {80 * MIB}\nprint(); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    group.add(process.pid)
    process.stdout.readline()
    is_capped = group.limit(20 * MIB)
    process.communicate("\n")
    assert not is_capped or process.returncode == -9  # v1 refuses, v2 kills


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_groups_are_removed_whatever_happens(error: type[BaseException]) -> None:
    folders = []

    def interrupted() -> None:
        with memory_groups() as found:
            if found is not None:
                folders.append(found.new("one").folder)
                assert folders[0].is_dir()
            raise error

    with pytest.raises(error):
        interrupted()
    assert not any(folder.exists() or folder.parent.exists() for folder in folders)


def test_without_controllers_there_are_no_groups(tmp_path: Path) -> None:
    with memory_groups(tmp_path) as found:
        assert found is None
    assert list(tmp_path.iterdir()) == []
