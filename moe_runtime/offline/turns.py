"""Whose turn it is, where two groups of a pass multiply and attend in turns."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class StoppedError(Exception):
    """The other group failed, or the run was interrupted: this one has nothing to go on for."""


class Turns:
    """A baton between groups 0 and 1, each in a thread of its own; knows no tensors.

    A group holds the baton while it does anything but attend, from `begin` to `end`; at the entry
    of `attending` it goes to the other group, and leaving waits until it is back. So products
    alternate, layer by layer; one group attends at a time, too; and a group whose layers have run
    out leaves the baton to the other. After `stop` whoever waits, or would, gets StoppedError.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._holder = 0
        self._running = {0, 1}
        self._is_attending = False
        self._is_stopped = False

    def begin(self, group: int) -> None:
        """Wait for the turn of `group`."""
        self._wait(lambda: self._holder == group)

    @contextmanager
    def attending(self, group: int) -> Iterator[None]:
        """Between two turns of `group`: the other one's products run beside what is inside."""
        self._pass_on(group)
        with self._changed:
            self._wait(lambda: not self._is_attending)
            self._is_attending = True
        try:
            yield
        finally:
            with self._changed:
                self._is_attending = False
                self._changed.notify_all()
        self.begin(group)

    def end(self, group: int) -> None:
        """`group` takes no more turns."""
        with self._changed:
            self._running.discard(group)
        self._pass_on(group)

    def is_running(self, group: int) -> bool:
        """Whether `group` may take more turns."""
        return group in self._running

    def stop(self) -> None:
        """Let both groups end where they are."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()

    def _pass_on(self, group: int) -> None:
        with self._changed:
            if 1 - group in self._running:
                self._holder = 1 - group
            self._changed.notify_all()

    def _wait(self, is_free: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._is_stopped or is_free())
            if self._is_stopped:
                raise StoppedError
