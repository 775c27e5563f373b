"""Contestants take turns on the same tokens, in an order that moves on, and none stops the rest."""

from typing import Any, cast

import pytest

from moe_runtime.errors import ContestantError
from moe_runtime.measure.bench import rounds
from moe_runtime.measure.bench.contestant_process import ContestantProcess, Turn
from moe_runtime.measure.bench.disk_rate import SETTINGS, DiskRate
from moe_runtime.measure.bench.rounds import Lane, Schedule, take_turns
from moe_runtime.measure.random_read import RandomReads


class FakeProcess:
    """Notes what it is asked; fails from the round `fails_at` on."""

    def __init__(self, log: list[tuple[str, int]], name: str, fails_at: int = 99) -> None:
        self.log = log
        self.name = name
        self.fails_at = fails_at

    def run(self, tokens: tuple[int, ...], *, first_row: int, **_: Any) -> Turn:
        index = first_row // len(tokens)
        if index >= self.fails_at:
            raise ContestantError("needs more than 1.0 GiB", is_memory=True)
        self.log.append((self.name, index))
        return Turn(milliseconds=(1.0,) * len(tokens), bytes_read=0, counters={})

    def cpu_seconds(self) -> float:
        return 0.0


class FakeReads:
    """A disk that is fastest with large blocks, and ten times faster after the first four turns."""

    def __init__(self, log: list[tuple[str, int]]) -> None:
        self.log = log
        self.num_reads = 0

    def read_for(self, *, block_bytes: int, num_threads: int, seconds: float) -> tuple[int, float]:
        self.num_reads += 1
        self.log.append(("disk", block_bytes))
        return block_bytes * (10 if self.num_reads > 8 else 1), 1e-3


def lane(process: FakeProcess, *, is_rated: bool = False) -> Lane:
    return Lane(
        name=process.name,
        process=cast(ContestantProcess, process),
        variant="",
        reads_disk=True,
        is_rated=is_rated,
    )


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "_PAUSE_SECONDS", 0.0)


def schedule(num_steps: int = 60) -> Schedule:
    return Schedule.of(num_steps=num_steps, seconds=60.0, num_lanes=3, vocab_size=100)


def test_everyone_gets_every_round_and_nobody_always_starts() -> None:
    log: list[tuple[str, int]] = []
    plan = schedule()
    found = take_turns(
        [lane(FakeProcess(log, name)) for name in "abc"], plan, None, lambda done, total: None
    )
    assert all(len(turns) == plan.num_rounds for turns in found.turns.values())
    starters = [name for name, _ in log[::3]]
    assert starters == [*"abc"] * (plan.num_rounds // 3)
    assert [index for _, index in log] == sorted(index for _, index in log)


def test_who_fails_is_left_out_and_the_others_go_on() -> None:
    log: list[tuple[str, int]] = []
    lanes = [lane(FakeProcess(log, "a", fails_at=2)), lane(FakeProcess(log, "b"))]
    found = take_turns(lanes, schedule(), None, lambda done, total: None)
    assert found.failures["a"].is_memory
    assert "a" not in found.turns
    assert len(found.turns["b"]) == schedule().num_rounds


def test_a_rated_turn_stands_between_two_reads_and_has_their_rate() -> None:
    log: list[tuple[str, int]] = []
    plan = schedule()
    disk = DiskRate(cast(RandomReads, FakeReads(log)), num_trial_rounds=plan.first_counted)
    lanes = [lane(FakeProcess(log, "a"), is_rated=True), lane(FakeProcess(log, "b"))]
    found = take_turns(lanes, plan, disk, lambda done, total: None)
    places = [place for place, (name, _) in enumerate(log) if name == "a"]
    assert all(log[place - 1][0] == log[place + 1][0] == "disk" for place in places)
    assert sum(name == "disk" for name, _ in log) == 2 * plan.num_rounds
    assert found.rates_gbps.keys() == {"a"}
    largest = max(block for block, _ in SETTINGS)
    assert found.rates_gbps["a"][plan.first_counted :] == pytest.approx(
        [largest * 1e-5] * (plan.num_rounds - plan.first_counted)
    )


def test_a_rate_is_that_of_its_own_round() -> None:
    log: list[tuple[str, int]] = []
    plan = schedule()
    disk = DiskRate(cast(RandomReads, FakeReads(log)), num_trial_rounds=0)
    disk.found[2**20, 2] = [1e9]  # so that one setting reads everywhere
    found = take_turns(
        [lane(FakeProcess(log, "a"), is_rated=True)], plan, disk, lambda done, total: None
    )
    slow, fast = found.rates_gbps["a"][:4], found.rates_gbps["a"][4:]
    assert slow == pytest.approx([2**20 * 1e-6] * 4)
    assert fast == pytest.approx([2**20 * 1e-5] * len(fast))


def test_settings_are_tried_in_turn_and_the_best_one_goes_on() -> None:
    disk = DiskRate(cast(RandomReads, FakeReads([])), num_trial_rounds=3)
    for index in range(5):
        disk.read(index, 0.1)
    assert [len(disk.found[setting]) for setting in SETTINGS] == [1, 1, 3]
    assert {one["blocks_at_a_time"] for one in disk.as_list()} == {2, 8}


@pytest.mark.parametrize("num_steps", [6, 12, 60, 240, 480, 481])
def test_a_schedule_has_rounds_enough_and_tokens_enough(num_steps: int) -> None:
    plan = schedule(num_steps)
    assert plan.num_rounds * plan.tokens_per_round >= num_steps
    assert plan.num_rounds >= min(num_steps, 12)
    assert plan.first_counted == plan.num_rounds // 3
    assert plan.turn_seconds > 0


def test_a_schedule_is_the_same_every_time() -> None:
    assert schedule().rounds == schedule().rounds
