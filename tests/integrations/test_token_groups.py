"""Lines whose passes run as two groups have the tokens that they would have alone."""

import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

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
from moe_runtime.offline.engine import OfflineEngine, PassReport
from moe_runtime.offline.group_choice import GroupChoice
from moe_runtime.offline.group_model import GroupModel
from moe_runtime.offline.grouped_forward import GroupedForward
from moe_runtime.offline.pass_scheduler import PassPlan, PassScheduler
from moe_runtime.offline.pass_size import PassSize
from moe_runtime.offline.sequence import Sequence as Line
from tests.tiny_models import tiny_model

SIZES = [(3, 9), (40, 12), (17, 1), (28, 30), (8, 40), (64, 5), (2, 25)]
# Grouped queries; a shared expert; sinks and sliding windows; latent attention.
FAMILIES = ["mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3"]


@pytest.fixture(scope="module")
def load_tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., PreTrainedModel]:
    def load(name: str, policy: ScanPolicy, expert_memory: str = "50%") -> PreTrainedModel:
        folder: Path = tmp_path_factory.mktemp(name)
        tiny_model(name).save_pretrained(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of few slots
            return moe_runtime.load(
                folder,
                expert_memory=expert_memory,
                policy=policy,
                warm_start=False,
                dtype="float32",
            )

    return load


def lines() -> list[Line]:
    draw = torch.Generator().manual_seed(3)
    return [
        Line(
            number=number,
            prompt_ids=torch.randint(8, 160, (prompt,), generator=draw).tolist(),
            max_new_tokens=new,
        )
        for number, (prompt, new) in enumerate(SIZES)
    ]


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
        forward = GroupedForward(paged, choice, on_turn=turn_listener(owner, policy))
        with closing(forward):
            yield StreamedForward(forward, owner, policy), forward, scheduler, todo


def run(forward: StreamedForward, scheduler: PassScheduler) -> PassReport:
    def choose(logits_NV: torch.Tensor, sequences: Sequence[Line]) -> list[int]:
        assert len(logits_NV) == len(sequences)
        assert not logits_NV.requires_grad
        return logits_NV.argmax(-1).tolist()

    engine = OfflineEngine(
        forward,
        scheduler,
        PassSize(),
        choose=choose,
        is_finished=lambda line: len(line.written) == line.max_new_tokens,
    )
    assert len(list(engine.run())) == len(SIZES)
    return engine.report


def alone(model: PreTrainedModel, line: Line) -> list[int]:
    ids = torch.tensor([line.prompt_ids])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=line.max_new_tokens,
        min_new_tokens=line.max_new_tokens,
        eos_token_id=None,
        do_sample=False,
    )
    return output[0, len(line.prompt_ids) :].tolist()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """As at a terminal, where this process may have been started to ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_are_those_of_generate(
    name: str, load_tiny: Callable[..., PreTrainedModel]
) -> None:
    """Law: in float32, with pages enough, and with so few that lines are preempted."""
    policy = ScanPolicy()
    model = load_tiny(name, policy)
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
    load_tiny: Callable[..., PreTrainedModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Law: on demand and ahead together, from slots for one layer and what is read ahead of it."""
    policy = ScanPolicy()
    model = load_tiny(name, policy, expert_memory)
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
    load_tiny: Callable[..., PreTrainedModel],
) -> None:
    """Law: groups that would read experts twice do not come about; the remedy does."""
    model = load_tiny("mixtral", ScanPolicy(), "25%")
    owner = moe_runtime.handle(model)
    sentence = why_one_group(owner)
    assert f"{owner.budget.num_slots} slots hold fewer than the 10 experts" in sentence
    owner.close()


def test_an_error_in_one_group_ends_the_pass(
    load_tiny: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: it surfaces as it is, no group goes on, and the next pass runs."""
    policy = ScanPolicy()
    model = load_tiny("mixtral", policy)
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
    load_tiny: Callable[..., PreTrainedModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Law: Ctrl-C reaches the main thread while groups run; it leaves when none of them runs."""
    policy = ScanPolicy()
    model = load_tiny("mixtral", policy)
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
