"""Shows how a model loads, and how far the work after it is."""

from contextlib import ExitStack

from moe_runtime.cli.terminal import Meter, Terminal


class LoadingView:
    """Bars one after the other. `on_screen` holds the bar or spinner of the moment, if any."""

    def __init__(self, terminal: Terminal, on_screen: ExitStack) -> None:
        self.terminal = terminal
        self.on_screen = on_screen
        self._meter: Meter | None = None

    def on_loading(self, done: int, total: int) -> None:
        self.show_progress("loading", done, total)

    def on_loaded(self, placement: str) -> None:
        self.clear()
        self.terminal.remark(placement)

    def show_progress(self, what: str, done: int, total: int) -> None:
        """`done` of `total`, in the bar that is on screen or in a new one named `what`."""
        if self._meter is None:
            self._meter = self.on_screen.enter_context(self.terminal.progress(what))
        self._meter.update(done, total)

    def clear(self) -> None:
        """Take away what is on screen."""
        self.on_screen.close()
        self._meter = None
