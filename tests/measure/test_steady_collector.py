"""What was there before a run is not gone through while it lasts, and is collected after it."""

import gc
import weakref

import pytest

from moe_runtime.measure.steady_collector import steady_collector


class Node:
    """Part of a cycle."""

    def __init__(self) -> None:
        self.itself = self


def test_old_objects_are_left_alone_and_new_ones_are_collected() -> None:
    old = Node()
    of_old = weakref.ref(old)
    with steady_collector():
        new = Node()
        of_new = weakref.ref(new)
        del old, new
        gc.collect()
        assert of_old() is not None
        assert of_new() is None
    gc.collect()
    assert of_old() is None


def test_a_run_that_fails_leaves_the_collector_as_it_was() -> None:
    def fail() -> None:
        with steady_collector():
            assert gc.get_freeze_count() > 0
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert gc.get_freeze_count() == 0
