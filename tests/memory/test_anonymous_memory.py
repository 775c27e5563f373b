"""Host memory for slots and buffers."""

import re
from pathlib import Path

import pytest

from moe_runtime.memory.anonymous_memory import anonymous_memory

HUGE = 2 * 2**20
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.parametrize("num_bytes", [1, 4096, HUGE - 1, HUGE, 3 * HUGE + 5])
def test_memory_is_of_the_size_asked_for_zero_and_on_a_page(num_bytes: int) -> None:
    memory = anonymous_memory(num_bytes)
    assert memory.shape == (num_bytes,)
    assert not memory.any()
    assert memory.ctypes.data % (HUGE if num_bytes >= HUGE else 4096) == 0
    memory[-1] = 1
    assert memory.sum() == 1


@pytest.mark.skipif(
    not SETTING.is_file() or "[never]" in SETTING.read_text(), reason="no huge pages here"
)
def test_what_holds_huge_pages_may_have_them() -> None:
    """Law: the kernel is asked for huge pages where it grants them, in a private mapping."""
    memory = anonymous_memory(8 * HUGE)
    memory[:] = 1
    address = memory.ctypes.data
    maps = Path("/proc/self/smaps").read_text()
    for head, body in re.findall(r"^([0-9a-f]+-[0-9a-f]+ .*)\n((?:[A-Z].*\n)+)", maps, re.M):
        start, end = (int(part, 16) for part in head.split()[0].split("-"))
        if start <= address < end:
            assert head.split()[1] == "rw-p"
            assert re.search(r"^VmFlags:.* hg\b", body, re.M)
            return
    raise AssertionError("the mapping is not listed")
