"""Keeps transformers quiet and says how far it has come with loading weights."""

from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from typing import Any

import transformers
from transformers.utils.logging import set_tqdm_hook

OnProgress = Callable[[int, int], None]  # tensors loaded, tensors in all


@contextmanager
def quiet_transformers(on_progress: OnProgress) -> Iterator[None]:
    """No logs below errors, and no bars: `on_progress` hears what they would show."""
    verbosity = transformers.logging.get_verbosity()
    previous = set_tqdm_hook(lambda _, args, kwargs: _Counted(on_progress, *args, **kwargs))
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        set_tqdm_hook(previous)


class _Counted:
    """Stands in for a tqdm bar: what is not counted here does nothing."""

    def __init__(self, on_progress: OnProgress, items: Any = (), *_: Any, **__: Any) -> None:
        self._items = items
        self._on_progress = on_progress

    def __iter__(self) -> Iterator[Any]:
        total = len(self._items) if isinstance(self._items, Sized) else 0
        for done, item in enumerate(self._items):
            self._on_progress(done, total)
            yield item
        self._on_progress(total, total)

    def __enter__(self) -> "_Counted":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None
