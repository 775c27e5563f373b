"""The kernel benchmark runs every variant, gates their outputs, and says what it compared."""

import json
from dataclasses import replace

import pytest
import torch

from moe_runtime.errors import ProbeError
from moe_runtime.kernels.cpu.experts import CpuExperts
from moe_runtime.measure.bench import expert_steps, form_pool
from moe_runtime.measure.bench.expert_forms import measure_forms
from moe_runtime.measure.bench.expert_steps import measure_steps
from moe_runtime.measure.bench.resident_decode import measure_resident, random_model
from tests.command_line import run_here
from tests.small_preset import small_preset

Capsys = pytest.CaptureFixture[str]

FORMS = (
    "packed", "int8", "int4", "fp8", "mxfp4", "fp8, dequantised first", "mxfp4, dequantised first",
)  # fmt: skip
pytestmark = pytest.mark.skipif(CpuExperts.load(torch.bfloat16) is None, reason=CpuExperts.status())


@pytest.fixture(autouse=True)
def small_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_steps, "_POOL_BYTES", 2**20)
    monkeypatch.setattr(form_pool, "_POOL_BYTES", 2**20)


def test_steps_are_paired_with_reads_of_as_many_bytes() -> None:
    """Law: 1, 2, 4 and 8 tokens with at most two rows an expert, and eight rows of one."""
    seen = []
    shares = measure_steps(
        small_preset("olmoe-1b-7b"), rounds=2, on_round=lambda *done: seen.append(done)
    )
    assert seen == [(0, 2), (1, 2), (2, 2)]
    assert [(s.tokens, s.num_experts, s.rows_per_expert) for s in shares] == [
        (1, 3, 1), (2, 3, 2), (4, 6, 2), (8, 8, 2), (8, 1, 8),
    ]  # fmt: skip
    for one in shares:
        assert one.step_bytes == one.num_experts * 6 * 64 * 96
        assert one.share.median > 0


def test_forms_take_turns_with_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: experts of the same weights in every form, with the share of bytes that they have."""
    preset = small_preset("olmoe-1b-7b")
    forms = measure_forms(preset, rounds=2, on_round=lambda *_: None)
    expected = dict(zip(FORMS, (0.76, 0.52, 0.30, 0.51, 0.28, 0.51, 0.28), strict=True))
    assert [(one.form, one.tokens) for one in forms] == [
        (form, tokens) for form in FORMS for tokens in (1, 2, 4, 8)
    ]
    for one in forms:
        share = expected[one.form]
        assert share - 0.05 < one.share_of_bytes < share + 0.03
        assert one.speedup.median > 0
        assert one.share.median > 0
    monkeypatch.setattr(form_pool, "available_memory_bytes", lambda: 2**20)
    with pytest.raises(ProbeError, match=r"bfloat16 experts of .* choose smaller shapes"):
        measure_forms(preset, rounds=2, on_round=lambda *_: None)


def test_all_variants_take_part_and_agree() -> None:
    """Law: a layer of ours is as near to float32 as eager's, and only then is there a speed."""
    report = measure_resident(
        small_preset("mixtral-8x7b"),
        rounds=2,
        tokens_per_round=4,
        prefill_tokens=20,
        on_round=lambda done, total: None,
    )
    assert set(report.decode_ms) == {
        "eager", "grouped_mm", "moe_runtime", "moe_runtime, linears", "no_experts",
    }  # fmt: skip
    assert set(report.errors) == {"eager", "grouped_mm", "moe_runtime"}
    assert report.is_green
    worse = replace(report, errors={**report.errors, "moe_runtime": 1.0})
    assert not worse.is_green
    assert report.experts == CpuExperts.status()


def test_a_random_model_has_the_buffers_of_its_config() -> None:
    """Law: what no checkpoint holds is computed, and weights are numbers."""
    model = random_model(small_preset("olmoe-1b-7b"))
    assert all(value.isfinite().all() for value in (*model.parameters(), *model.buffers()))
    for buffer in model.buffers():
        assert buffer.abs().max() > 0


def test_the_command_prints_one_object(capsys: Capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_runtime.measure.bench import presets

    small = replace(small_preset("mixtral-8x7b"), name="tiny")
    monkeypatch.setattr(presets, "load_preset", lambda name: small)
    words = ("bench", "kernels", "--rounds", "2", "--tokens", "2", "--prefill", "8")
    outcome = run_here(capsys, *words, "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert found["gpu"] is None
    assert len(found["steps"]) == 5
    assert [form["form"] for form in found["forms"]] == [form for form in FORMS for _ in range(4)]
    assert found["resident"]["shape"] == "tiny"
    table = run_here(capsys, *words, "--steps-only")
    assert "share of reads" in table.out
    assert "times as fast" in table.out
    assert "GPU: not measured" in table.err


def test_without_a_kernel_it_says_so(capsys: Capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuExperts, "load", lambda *_, **__: None)
    outcome = run_here(capsys, "bench", "kernels", "--steps-only")
    assert "there is no kernel to measure" in outcome.error()
