"""Lines that share passes over pages have the tokens that they would have alone."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

import moe_runtime
from moe_runtime.cache.scan import ScanPolicy
from moe_runtime.errors import UnsupportedModelError
from moe_runtime.integrations.transformers.own_cache_model import OwnCacheModel
from moe_runtime.integrations.transformers.paged_model import PagedModel
from moe_runtime.integrations.transformers.streamed_forward import StreamedForward
from moe_runtime.offline.cohort_scheduler import CohortScheduler
from moe_runtime.offline.engine import Forward, PassReport
from moe_runtime.offline.page_table import PageTable, pages_for
from moe_runtime.offline.pass_scheduler import PassPlan, PassScheduler, Scheduler
from moe_runtime.offline.pass_size import PassSize
from moe_runtime.offline.sequence import Sequence as Line
from tests.greedy_lines import alone, load_tiny, make_lines, run_lines

# Grouped queries; a shared expert; sinks and sliding windows; latent attention, whose values are
# narrower than its keys; each layer another window.
SERVED = ["mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3", "deepseek_v2", "olmoe", "gemma4_text"]
# States of convolutions, Mamba and linear attention; an index of its own into the past.
REFUSED = ["lfm2_moe", "jamba", "qwen3_next", "deepseek_v32"]
SIZES = [(3, 9), (40, 12), (17, 1), (28, 70), (8, 60), (64, 5), (2, 25)]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., PreTrainedModel]:
    return lambda name, *settings, **named: load_tiny(
        tmp_path_factory.mktemp(name), name, *settings, **named
    )


def lines() -> list[Line]:
    return make_lines(SIZES)


def run(model: PreTrainedModel, forward: Forward, scheduler: Scheduler) -> PassReport:
    weights = moe_runtime.handle(model)
    return run_lines(forward, scheduler, PassSize(), weights=weights, num_lines=len(SIZES))


@pytest.mark.parametrize("name", SERVED)
def test_greedy_tokens_are_those_of_generate(
    name: str, load: Callable[..., PreTrainedModel]
) -> None:
    """Law: in float32, with pages enough, and with so few that lines are preempted."""
    model = load(name)
    expected = [alone(model, line) for line in lines()]
    with PagedModel(model) as paged:
        for num_pages, is_short in ((40, False), (4, True)):
            todo = lines()
            pages = paged.open_pages(num_pages)
            scheduler = PassScheduler(todo, pages.table, pass_tokens=lambda: 70, max_sequences=5)
            report = run(model, paged, scheduler)
            assert [line.written for line in todo] == expected
            assert (report.preempted > 0) == is_short
    assert [alone(model, line) for line in lines()] == expected  # nothing of ours is left in it
    moe_runtime.handle(model).close()


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_pages_cannot_serve_runs_with_its_own_attention(
    name: str, load: Callable[..., PreTrainedModel]
) -> None:
    model = load(name)
    with pytest.raises(UnsupportedModelError):
        PagedModel(model)
    expected = [alone(model, line) for line in lines()]
    own = OwnCacheModel(model)
    assert own.page_bytes() > 0
    todo = lines()
    scheduler = CohortScheduler(todo, PageTable(12), max_sequences=3)
    run(model, own, scheduler)
    written = [line.written for line in todo]
    # A state sees padding of another length, as in transformers' own batches: not every family
    # gives a prompt in a batch the tokens that it gives it alone. Each line got its number of them.
    assert [len(tokens) for tokens in written] == [len(tokens) for tokens in expected]
    moe_runtime.handle(model).close()


def test_own_attention_gives_the_tokens_of_generate(
    load: Callable[..., PreTrainedModel],
) -> None:
    model = load("mixtral")
    todo = lines()
    run(model, OwnCacheModel(model), CohortScheduler(todo, PageTable(12), max_sequences=3))
    assert [line.written for line in todo] == [alone(model, line) for line in lines()]
    moe_runtime.handle(model).close()


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_pass_reads_each_expert_at_most_once(
    name: str, load: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: a pass reads no more experts than there are, on demand and ahead together."""
    policy = ScanPolicy()
    model = load(name, policy)
    owner = moe_runtime.handle(model)
    expected = [alone(model, line) for line in lines()]
    todo = lines()
    with PagedModel(model) as paged:
        pages = paged.open_pages(sum(pages_for(line.most_tokens) for line in todo))
        scheduler = PassScheduler(todo, pages.table, pass_tokens=lambda: 400, max_sequences=99)
        streamed = StreamedForward(paged, owner, policy)
        reads = []

        def count() -> int:
            return owner.report()["cache"]["misses"] + owner.engine.ledger.counts.started

        real_run = streamed.run

        def counted_run(plan: PassPlan) -> torch.Tensor:
            before = count()
            logits = real_run(plan)
            reads.append(count() - before)
            return logits

        monkeypatch.setattr(streamed, "run", counted_run)
        report = run(model, streamed, scheduler)
    assert 0 < report.most_pass_experts_loaded <= owner.budget.num_experts
    assert [line.written for line in todo] == expected
    assert max(reads) <= owner.budget.num_experts
    assert sum(reads) > 0
    owner.close()


def test_half_precision_is_served_too(load: Callable[..., PreTrainedModel]) -> None:
    model = load("mixtral", dtype="bfloat16")
    todo = lines()
    with PagedModel(model) as paged:
        pages = paged.open_pages(40)
        scheduler = PassScheduler(todo, pages.table, pass_tokens=lambda: 400, max_sequences=99)
        run(model, paged, scheduler)
        assert pages.layers[0].key_BGdP.dtype == torch.bfloat16
    assert all(len(line.written) == line.max_new_tokens for line in todo)
    moe_runtime.handle(model).close()
