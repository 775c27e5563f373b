"""Two groups that take turns: who may do what at a time, whatever their pace."""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.offline.turns import StoppedError, Turns

END_SECONDS = 20.0  # far more than any of this takes: a group that hangs shows as a failure


@dataclass
class Log:
    """What is under way, and the order in which products began."""

    order: list[int] = field(default_factory=list)
    products: int = 0
    attentions: int = 0

    def multiply(self, group: int, seconds: float) -> None:
        self.products += 1
        assert self.products == 1, "two groups multiply"
        self.order.append(group)
        time.sleep(seconds)
        self.products -= 1

    def attend(self, seconds: float) -> None:
        self.attentions += 1
        assert self.attentions == 1, "two groups attend"
        time.sleep(seconds)
        self.attentions -= 1


def run_group(
    turns: Turns, log: Log, group: int, num_layers: int, pace: random.Random, fails_at: int = -1
) -> int:
    """Products before each layer's attention and behind the last one, as a forward has them."""
    try:
        turns.begin(group)
        for layer in range(num_layers):
            log.multiply(group, pace.random() * 1e-3)
            with turns.attending(group):
                if layer == fails_at:
                    raise ValueError(f"layer {layer}")
                log.attend(pace.random() * 1e-3)
        log.multiply(group, 0.0)
        return num_layers
    except BaseException:
        turns.stop()
        raise
    finally:
        turns.end(group)


@settings(max_examples=40)
@given(layers=st.tuples(st.integers(0, 8), st.integers(0, 8)), seed=st.integers(0, 2**16))
def test_products_alternate_and_nothing_runs_twice_at_a_time(
    layers: tuple[int, int], seed: int
) -> None:
    """Law: at any pace, and when one group has fewer layers: then the other goes on alone."""
    turns, log = Turns(), Log()
    with ThreadPoolExecutor(2) as threads:
        running = [
            threads.submit(run_group, turns, log, group, layers[group], random.Random(seed + group))
            for group in (0, 1)
        ]
        ended, _ = wait(running, END_SECONDS)
        turns.stop()
    assert len(ended) == 2
    assert [one.result() for one in running] == list(layers)
    together = 2 * (min(layers) + 1)
    longer = layers.index(max(layers))
    assert log.order[:together] == [0, 1] * (together // 2)
    assert log.order[together:] == [longer] * (max(layers) - min(layers))


@settings(max_examples=40)
@given(
    layers=st.integers(1, 6),
    fails_at=st.integers(0, 5),
    group=st.integers(0, 1),
    seed=st.integers(0, 2**16),
)
def test_an_error_ends_both(layers: int, fails_at: int, group: int, seed: int) -> None:
    """Law: the group that fails keeps its error, and the other one waits for nothing."""
    turns, log = Turns(), Log()
    fails_at = min(fails_at, layers - 1)
    with ThreadPoolExecutor(2) as threads:
        running = [
            threads.submit(
                run_group, turns, log, one, layers, random.Random(seed + one),
                fails_at if one == group else -1,
            )
            for one in (0, 1)
        ]  # fmt: skip
        ended, _ = wait(running, END_SECONDS)
        turns.stop()
    assert len(ended) == 2
    assert isinstance(running[group].exception(), ValueError)
    other = running[1 - group].exception()
    assert other is None or isinstance(other, StoppedError)


def test_whoever_waits_is_let_go_by_a_stop() -> None:
    turns = Turns()
    began = threading.Event()

    def second() -> None:
        began.set()
        turns.begin(1)

    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(second)
        assert began.wait(END_SECONDS)
        turns.stop()
        with pytest.raises(StoppedError):
            waiting.result(END_SECONDS)
    with pytest.raises(StoppedError):
        turns.begin(0)
