"""The one place where commands write: results on stdout, everything about them on stderr."""

import json
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.status import Status
from rich.text import Text

# A model may write anything; what moves the cursor or changes colours must not reach the terminal.
_CONTROLS = dict.fromkeys((*range(32), *range(127, 160)), "�")
_VISIBLE = {**_CONTROLS, ord("\n"): "\n", ord("\t"): "\t", ord("\r"): ""}


class Terminal:
    """Where a command speaks. With `as_json`, stdout gets one object and nothing else."""

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        self._results = Console(highlight=False, soft_wrap=True)
        self._remarks = Console(stderr=True, highlight=False)

    def write(self, text: str, *, style: str | None = None) -> None:
        """Text as it comes, without a line end."""
        if not self.as_json:
            self._results.out(text.translate(_VISIBLE), style=style, end="", highlight=False)
            self._results.file.flush()

    def show(self, renderable: RenderableType) -> None:
        """A table or the like."""
        if not self.as_json:
            self._results.print(renderable)

    def show_json(self, found: Mapping[str, Any]) -> None:
        """The one object of `--json`."""
        sys.stdout.write(json.dumps(found, indent=2, allow_nan=False) + "\n")
        sys.stdout.flush()

    def remark(self, sentence: str, *, style: str = "dim") -> None:
        """One line on stderr."""
        line = Text(" ".join(sentence.split()), style=style)
        # A person reads wrapped words; a log keeps one line a remark.
        self._remarks.print(line, soft_wrap=not self._remarks.is_terminal)

    def warn(self, sentence: str) -> None:
        """One line on stderr that deserves attention."""
        self.remark(f"warning: {sentence}", style="yellow")

    def fail(self, sentence: str) -> None:
        """The one line that ends a command."""
        self.remark(f"error: {sentence}", style="bold red")

    def waiting(self, what: str) -> Status:
        """A spinner on stderr while something takes time; use it in a `with`."""
        return self._remarks.status(Text(what, style="dim"))

    @contextmanager
    def progress(self, what: str) -> "Iterator[Meter]":
        """A bar on stderr while something countable is done."""
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", style="dim"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
        )
        is_seen = self._remarks.is_terminal
        with Progress(*columns, console=self._remarks, transient=True, disable=not is_seen) as bar:
            yield Meter(bar, what)

    @contextmanager
    def warnings_as_remarks(self) -> Iterator[None]:
        """Python's warnings become lines like our own, each once."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # for programmers, not for users
            warnings.simplefilter("once", UserWarning)
            warnings.showwarning = lambda message, *_, **__: self.warn(str(message))
            yield


class Meter:
    """One bar of `Terminal.progress`."""

    def __init__(self, bar: Progress, what: str) -> None:
        self._bar = bar
        self._task = bar.add_task(what, total=None)

    @property
    def is_seen(self) -> bool:
        """Whether there is a person to watch it."""
        return not self._bar.disable

    def update(self, done: int, total: int) -> None:
        self._bar.update(self._task, completed=done, total=total)

    def say(self, what: str) -> None:
        """Another word beside the bar."""
        self._bar.update(self._task, description=what)
