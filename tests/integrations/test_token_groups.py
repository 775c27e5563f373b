"""Lines whose passes run as two groups have the tokens that they would have alone."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import pytest
import torch
from transformers import PreTrainedModel

import moe_runtime
from moe_runtime.cache.scan import ScanPolicy
from moe_runtime.integrations.transformers import paged_model
from moe_runtime.integrations.transformers.paged_model import PagedModel
from moe_runtime.integrations.transformers.streamed_forward import (
    StreamedForward,
    turn_listener,
    why_one_group,
)
from moe_runtime.offline.engine import PassReport
from moe_runtime.offline.group_choice import GroupChoice
from moe_runtime.offline.group_model import GroupModel
from moe_runtime.offline.grouped_forward import GroupedForward
from moe_runtime.offline.pass_scheduler import PassPlan, PassScheduler
from moe_runtime.offline.pass_size import PassSize
from moe_runtime.offline.sequence import Sequence as Line
from tests.greedy_lines import alone, load_tiny, make_lines, run_lines

SIZES = [(3, 9), (40, 12), (17, 1), (28, 30), (8, 40), (64, 5), (2, 25)]
# Grouped queries; a shared expert; sinks and sliding windows; latent attention.
FAMILIES = ["mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3"]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., PreTrainedModel]:
    return lambda name, *settings, **named: load_tiny(
        tmp_path_factory.mktemp(name), name, *settings, **named
    )


def lines() -> list[Line]:
    return make_lines(SIZES)


@contextmanager
def grouped(
    model: PreTrainedModel, policy: ScanPolicy, num_pages: int
) -> Iterator[tuple[StreamedForward, GroupedForward, PassScheduler, list[Line]]]:
    """Passes in two groups, all but the first one."""
    owner, todo = moe_runtime.handle(model), lines()
    with PagedModel(model) as paged:
        table = paged.open_pages(num_pages).table
        scheduler = PassScheduler(todo, table, pass_tokens=lambda: 70, max_sequences=5)
        choice = GroupChoice("2", GroupModel(num_threads=1, num_layers=len(paged.shapes)))
        on_turn = turn_listener(owner, policy)
        forward = GroupedForward(paged, choice, weights=owner, on_turn=on_turn)
        with closing(forward):
            yield StreamedForward(forward, owner, policy), forward, scheduler, todo


def run(forward: StreamedForward, scheduler: PassScheduler) -> PassReport:
    weights = forward.owner
    return run_lines(forward, scheduler, PassSize(), weights=weights, num_lines=len(SIZES))


@pytest.fixture
def interruptible() -> Iterator[None]:
    """As at a terminal, where this process may have been started to ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_are_those_of_generate(
    name: str, load: Callable[..., PreTrainedModel]
) -> None:
    """Law: in float32, with pages enough, and with so few that lines are preempted."""
    policy = ScanPolicy()
    model = load(name, policy)
    expected = [alone(model, line) for line in lines()]
    for num_pages, is_short in ((40, False), (4, True)):
        with grouped(model, policy, num_pages) as (streamed, forward, scheduler, todo):
            report = run(streamed, scheduler)
            assert [line.written for line in todo] == expected
            assert (report.preempted > 0) == is_short
            found = forward.choice.report()
            assert (found["passes_in_one"], found["groups"]) == (1, 2)
            assert found["passes_in_two"] > 10
    moe_runtime.handle(model).close()


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("expert_memory", ["32%", "50%", "80%"])
def test_a_pass_of_two_groups_reads_each_expert_at_most_once(
    name: str,
    expert_memory: str,
    load: Callable[..., PreTrainedModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Law: on demand and ahead together, from slots for one layer and what is read ahead of it."""
    policy = ScanPolicy()
    model = load(name, policy, expert_memory=expert_memory)
    owner = moe_runtime.handle(model)
    assert why_one_group(owner) == ""
    reads = []

    def count() -> int:
        """Reads but for those whose use is still to come, which are of the next pass."""
        ledger = owner.engine.ledger
        misses: int = owner.report()["cache"]["misses"]
        return misses + ledger.counts.started - ledger.num_unused

    with grouped(model, policy, 40) as (streamed, _, scheduler, _):
        real_run = streamed.run

        def counted_run(plan: PassPlan) -> torch.Tensor:
            before = count()
            logits = real_run(plan)
            reads.append(count() - before)
            return logits

        monkeypatch.setattr(streamed, "run", counted_run)
        run(streamed, scheduler)
    assert owner.engine.ledger.counts.started > 0
    assert max(reads) <= owner.budget.num_experts
    owner.close()


def test_fewer_slots_than_a_layer_needs_are_named(
    load: Callable[..., PreTrainedModel],
) -> None:
    """Law: groups that would read experts twice do not come about; the remedy does."""
    model = load("mixtral", ScanPolicy(), expert_memory="25%")
    owner = moe_runtime.handle(model)
    sentence = why_one_group(owner)
    assert f"{owner.budget.num_slots} slots hold fewer than the 10 experts" in sentence
    owner.close()


def test_an_error_in_one_group_ends_the_pass(
    load: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: it surfaces as it is, no group goes on, and the next pass runs."""
    policy = ScanPolicy()
    model = load("mixtral", policy)
    expected = [alone(model, line) for line in lines()]
    real = paged_model.attend
    calls = []

    def failing(*arguments: object) -> torch.Tensor:
        calls.append(arguments)
        if len(calls) == 40:
            raise ZeroDivisionError("attention of one group")
        return real(*arguments)

    monkeypatch.setattr(paged_model, "attend", failing)
    with grouped(model, policy, 40) as (streamed, _, scheduler, todo):
        ran = []

        def run_pass(plan: PassPlan | None) -> None:
            assert plan is not None
            ran.append(plan)
            for line, logits in zip(plan.sequences, streamed.run(plan), strict=True):
                line.written.append(int(logits.argmax()))

        def run_passes() -> None:
            while True:
                run_pass(scheduler.next_pass())

        with pytest.raises(ZeroDivisionError, match="of one group"):
            run_passes()
        assert policy.groups_to_come == 0
        run_pass(ran[-1])
        assert len(ran) > 2
        for line in todo:  # nobody asked whether they had ended
            whole = expected[line.number]
            assert line.written[: len(whole)] == whole[: len(line.written)]
    moe_runtime.handle(model).close()


def test_an_interrupt_ends_both_groups(
    interruptible: None,
    load: Callable[..., PreTrainedModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Law: Ctrl-C reaches the main thread while groups run; it leaves when none of them runs."""
    policy = ScanPolicy()
    model = load("mixtral", policy)
    real = paged_model.attend
    began = threading.Event()
    under_way = []

    def slow(*arguments: object) -> torch.Tensor:
        under_way.append(1)
        if threading.current_thread().name.startswith("moe-runtime-attention"):
            began.set()
            time.sleep(0.05)
        out = real(*arguments)
        under_way.pop()
        return out

    def interrupt() -> None:
        assert began.wait(20)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(paged_model, "attend", slow)
    with grouped(model, policy, 40) as (streamed, _, scheduler, _):
        interrupting = threading.Thread(target=interrupt)
        interrupting.start()
        with pytest.raises(KeyboardInterrupt):
            run(streamed, scheduler)
        assert not under_way
        interrupting.join()
    moe_runtime.handle(model).close()
