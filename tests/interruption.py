"""Interrupts a program before or after one of its own steps."""

import pytest

NEVER = 10**9


class Interruption:
    """Raises KeyboardInterrupt at the `calls_left`-th call of `owner.name` from now."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, when: str) -> None:
        self.calls_left = NEVER
        real = getattr(owner, name)

        def interrupted(*args: object, **kwargs: object) -> object:
            self.calls_left -= 1
            if self.calls_left == 0 and when == "before":
                raise KeyboardInterrupt
            result = real(*args, **kwargs)
            if self.calls_left == 0:
                raise KeyboardInterrupt
            return result

        monkeypatch.setattr(owner, name, interrupted)
