"""Laws of a recording: it agrees with the report, adds up, forgets no lane, and changes nothing."""

import gc
import itertools
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import moe_runtime
from moe_runtime.integrations.transformers import tiered_maths
from moe_runtime.recording.busy_reads import BusyReads
from moe_runtime.recording.run_record import (
    COPY,
    DENSE,
    DISK,
    EXPERTS,
    GARBAGE,
    PLAN,
    WAIT,
    Forward,
)
from moe_runtime.recording.visit_log import VisitLog
from tests.fake_tiers import put_tiers_below
from tests.tiny_checkpoint import NUM_LAYERS, TOP_K, save_mixtral

NUM_TOKENS = 20
PROMPT = torch.tensor([[5, 17, 80, 3]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixtral(tmp_path_factory.mktemp("recorder") / "model")


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that Triton does not know: torch computes each expert."""
    monkeypatch.setattr(tiered_maths, "find_grouped", lambda *_: "the test says no")


def load(folder: Path) -> PreTrainedModel:
    return moe_runtime.load(folder, expert_memory="40%", warm_start=False)


def write(model: PreTrainedModel, num_tokens: int = NUM_TOKENS) -> torch.Tensor:
    found: torch.Tensor = model.generate(  # type: ignore[operator]
        PROMPT, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False
    )
    return found


def test_counts_are_those_of_the_report_and_tokens_those_without_a_recorder(folder: Path) -> None:
    model = load(folder)
    expected = write(model)
    handle = moe_runtime.handle(model)
    before = handle.report()["cache"]
    with handle.recorder() as recorder:
        tokens = write(model)
    after, record = handle.report()["cache"], recorder.record()
    handle.close()
    assert tokens.equal(expected)
    for layer in range(NUM_LAYERS):
        old, new = before["per_layer"][layer], after["per_layer"][layer]
        assert record.hits_LB[layer].sum() == new["hits"] - old["hits"]
        assert record.misses_LB[layer].sum() == new["misses"] - old["misses"]
    assert record.num_misses > 0
    assert record.num_hits > 0
    # Buffers end on whole pages, files need not: what the last read of one asks for is more.
    bytes_read = after["bytes_read"] - before["bytes_read"]
    assert bytes_read <= record.bytes_read_S.sum() <= bytes_read + 4096 * record.num_misses
    assert record.prefill.num_forwards == 1
    assert record.prefill.num_tokens == PROMPT.numel()
    assert record.decode.num_forwards == record.decode.num_tokens == NUM_TOKENS - 1


def test_what_the_computing_thread_does_adds_up_to_the_forwards(folder: Path) -> None:
    """Law: dense, experts, plan and wait share a forward's seconds out among them."""
    model = load(folder)
    with moe_runtime.handle(model).recorder() as recorder:
        write(model)
    record = recorder.record()
    moe_runtime.handle(model).close()
    lanes = [record.lane_seconds[lane] for lane in (DENSE, EXPERTS, PLAN, WAIT)]
    assert all(seconds > 0.0 for seconds in lanes)
    forwards = record.prefill.seconds + record.decode.seconds
    assert sum(lanes) == pytest.approx(forwards, rel=1e-6)
    assert record.forward_seconds_B.sum() == pytest.approx(forwards)
    for lane, seconds in record.lane_seconds.items():
        assert record.lane_seconds_S[lane].sum() == pytest.approx(seconds)
        spans = record.recent_spans[lane]
        assert all(begin < end for begin, end in spans)
        assert all(a[1] <= b[0] + 1e-9 for a, b in itertools.pairwise(spans))
    assert record.lane_seconds[DISK] > 0.0
    assert len(record.recent_forwards) == record.num_forwards


def test_memory_is_bounded_and_the_last_forwards_are_whole(folder: Path) -> None:
    model = load(folder)
    num_spans = 60
    with moe_runtime.handle(model).recorder(num_spans=num_spans) as recorder:
        write(model)
    record = recorder.record()
    moe_runtime.handle(model).close()
    assert 0 < len(record.recent_forwards) < record.num_forwards
    assert sum(map(len, record.recent_spans.values())) <= num_spans
    for forward in record.recent_forwards:
        begin, end = forward.span
        inside = sum(
            stop - start
            for lane in (DENSE, EXPERTS, PLAN, WAIT)
            for start, stop in record.recent_spans[lane]
            if begin <= start and stop <= end
        )
        assert inside == pytest.approx(forward.seconds, rel=1e-6)


def test_what_the_garbage_collector_takes_is_a_lane_of_its_own(folder: Path) -> None:
    model = load(folder)
    callbacks = list(gc.callbacks)

    def collect(*_: object) -> None:
        gc.collect(0)

    hook = model.get_submodule("model.norm").register_forward_pre_hook(collect)
    with moe_runtime.handle(model).recorder() as recorder:
        write(model, 3)
    hook.remove()
    moe_runtime.handle(model).close()
    record = recorder.record()
    assert gc.callbacks == callbacks
    assert len(record.recent_spans[GARBAGE]) >= 3
    lanes = [record.lane_seconds[lane] for lane in (DENSE, EXPERTS, PLAN, WAIT)]
    assert record.lane_seconds[GARBAGE] < sum(lanes)


def test_nothing_listens_outside_of_the_with(folder: Path) -> None:
    model = load(folder)
    handle = moe_runtime.handle(model)
    hooks = len(model._forward_hooks), len(model._forward_pre_hooks)
    with handle.recorder() as recorder:
        write(model, 2)
    assert handle.engine.watch is None
    assert handle.engine.reader.watch is None  # type: ignore[union-attr]
    assert (len(model._forward_hooks), len(model._forward_pre_hooks)) == hooks
    num_forwards = recorder.record().num_forwards
    write(model, 2)
    assert recorder.record().num_forwards == num_forwards
    handle.close()


def test_a_forward_that_fails_leaves_a_record_that_agrees_with_the_report(folder: Path) -> None:
    model = load(folder)
    handle = moe_runtime.handle(model)

    def fail(*_: object) -> None:
        raise RuntimeError("stop here")

    last = model.get_submodule("model.layers.2.mlp")
    with handle.recorder() as recorder:
        hook = last.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="stop here"):
            write(model, 2)
        hook.remove()
        write(model, 2)
    record, cache = recorder.record(), handle.report()["cache"]
    handle.close()
    assert (record.num_hits, record.num_misses) == (cache["hits"], cache["misses"])
    assert record.num_forwards == 2
    assert {visit.forward for visit in record.first.visits} == {0, 1}


@pytest.mark.usefixtures("no_triton")
@pytest.mark.filterwarnings("ignore:host_memory and miss have no effect")
def test_tiers_of_a_device_are_heard_of_as_well(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: counts are those of the report; copies lie in time by the device's events."""
    put_tiers_below(monkeypatch)
    model = moe_runtime.load(
        folder, expert_memory="40%", host_memory="60%", miss="copy", warm_start=False
    )
    handle = moe_runtime.handle(model)
    engine: Any = handle.engine
    events = []
    copy = engine.copy
    monkeypatch.setattr(engine, "copy", lambda *a, **k: events.append(copy(*a, **k)) or events[-1])
    before = handle.report()
    with handle.recorder() as recorder:
        write(model)
    record, after = recorder.record(), handle.report()
    handle.close()
    assert record.num_hits == after["cache"]["hits"] - before["cache"]["hits"]
    assert record.num_misses == after["cache"]["misses"] - before["cache"]["misses"] > 0
    assert len(events) == after["tiers"]["misses_copied"] - before["tiers"]["misses_copied"]
    seconds = sum(end.seconds_since(start) for start, end in events)
    assert record.lane_seconds[COPY] == pytest.approx(seconds)
    assert record.lane_seconds[DISK] > 0.0
    assert {visit.forward for visit in record.first.visits} == set(range(NUM_TOKENS))


def test_a_run_without_a_forward_is_a_record_too(folder: Path) -> None:
    model = load(folder)
    with moe_runtime.handle(model).recorder() as recorder:
        pass
    moe_runtime.handle(model).close()
    record = recorder.record()
    assert record.num_forwards == record.num_hits == record.num_misses == 0
    assert record.recent_forwards == []
    assert record.first.is_whole


def test_first_forwards_are_what_layers_asked_for(folder: Path) -> None:
    model = load(folder)
    with moe_runtime.handle(model).recorder() as recorder:
        write(model, 4)
    moe_runtime.handle(model).close()
    first = recorder.record().first
    assert first.is_whole
    assert len(first.forwards) == 4
    assert [v.keys[0].layer for v in first.visits] == list(range(NUM_LAYERS)) * 4
    for visit in first.visits[NUM_LAYERS:]:
        assert len(visit.keys) == TOP_K
        assert list(visit.keys) == sorted(visit.keys)


def test_a_log_keeps_whole_forwards_within_its_bound() -> None:
    log = VisitLog(10)
    forward = Forward(span=(0.0, 1.0), num_tokens=1, is_decode=True)
    for _ in range(4):
        log.add(0, [3, 1])
        log.add(1, [2, 0])
        log.end(forward)
    kept = log.kept()
    assert not kept.is_whole
    assert len(kept.forwards) == 2
    expected = [[(0, 1), (0, 3)], [(1, 0), (1, 2)]] * 2
    assert [list(visit.keys) for visit in kept.visits] == expected
    assert [visit.forward for visit in kept.visits] == [0, 0, 1, 1]


def test_reads_that_overlap_are_one_stretch() -> None:
    reads = BusyReads()
    reads.begun()
    reads.begun()
    reads.ended(5)
    assert sum(num_bytes for *_, num_bytes in reads.take()) == 5  # cut where it was asked
    reads.ended(10)
    time.sleep(0.001)
    reads.begun()
    reads.ended(7)
    first, second = reads.take()
    assert (first[2], second[2]) == (10, 7)
    assert first[1] < second[0]
