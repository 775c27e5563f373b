"""Laws of the report page: whole, self-contained, escaped, and true to the run's report."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from moe_runtime.expert_memory import format_bytes
from moe_runtime.report.page import Comparison, Page, render_page, write_page
from tests.command_line import run_here
from tests.report.made_record import made_record
from tests.report.reading_html import ReadPage
from tests.tiny_checkpoint import NUM_LAYERS, save_mixtral

HOSTILE = "<img src=x onerror=alert(1)>&\"'</title></script>"
FULL = Path("/dev/full")  # takes no byte
REPORT: dict[str, Any] = {
    "cache": {"hits": 3, "slot_bytes": 1000, "bytes_read": 5000, "slots": 4, "policy": "lru"},
    "memory": {
        "expert_used_bytes": 4000,
        "expert_total_bytes": 9000,
        "dense_bytes": 800,
    },
    "tiers": None,
}


def heat_cells(read: ReadPage) -> dict[str, Any]:
    (found,) = [value for _, name, value in read.attributes if name == "data-cells"]
    cells: dict[str, Any] = json.loads(found)
    return cells


@pytest.mark.parametrize(
    ("num_layers", "num_bins", "per_bin"), [(1, 1, 1), (2, 3, 1), (61, 120, 8)]
)
def test_a_page_is_whole_and_fetches_nothing(num_layers: int, num_bins: int, per_bin: int) -> None:
    made = made_record(num_layers, num_bins, per_bin=per_bin)
    comparison = Comparison(rows=[("step", "1.0", "2.0", "0.50")], remark="by rates")
    page = render_page(Page(title="a model", record=made, report=REPORT, comparison=comparison))
    read = ReadPage(page)
    read.require_self_contained(page)
    assert "Predicted and measured" in read.text
    drawn = [value for tag, name, value in read.attributes if (tag, name) == ("path", "d")]
    assert not [value for value in drawn if not set(value) <= set("MLHVhvz .-0123456789")]
    cells = heat_cells(read)
    assert cells["hits"] == made.hits_LB.tolist()
    assert cells["misses"] == made.misses_LB.tolist()
    assert len(page) < 600_000


def test_hostile_names_are_text() -> None:
    """Law: model, settings, prompts and remarks cannot become markup."""
    page = render_page(
        Page(
            title=HOSTILE,
            record=made_record(),
            report=REPORT,
            figures=[(HOSTILE, HOSTILE)],
            prompts=[(HOSTILE, HOSTILE)],
            prompt_head=(HOSTILE, "b"),
            comparison=Comparison(rows=[(HOSTILE,) * 4], remark=HOSTILE),
            settings={HOSTILE: HOSTILE, "nested": {"list": [HOSTILE, 1]}},
            environment={"cpu": HOSTILE},
        )
    )
    read = ReadPage(page)
    read.require_self_contained(page)
    assert "img" not in read.names
    # Title, heading, tile, prompts and their head, comparison and remark, settings, environment.
    assert read.text.count(HOSTILE) == 16


@pytest.mark.skipif(not FULL.exists(), reason=f"no {FULL} here")
def test_a_disk_that_is_full_is_named() -> None:
    page = Page(title="a", record=made_record(), report=REPORT)
    with pytest.raises(OSError, match=r"report /dev/full cannot be written: No space left"):
        write_page(page, FULL)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixtral(tmp_path_factory.mktemp("page") / "<b>model & 'co'")


@pytest.mark.parametrize("num_tokens", [1, 9])
def test_counts_in_the_page_are_those_of_the_run(
    num_tokens: int, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Law: also for a run that decodes nothing, and for a model whose name is markup."""
    path = tmp_path / "run.html"
    outcome = run_here(
        capsys, "generate", model, "--prompt", "hello", "--prompt", "you", "--json",
        "--expert-memory", "50%", "--max-new-tokens", str(num_tokens), "--no-warm-start",
        "--report", path,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    page = path.read_text()
    read = ReadPage(page)
    read.require_self_contained(page)
    assert read.names.count("b") == 6  # of the tiles, none of the model's name
    cells, cache = heat_cells(read), found["cache"]
    for layer in range(NUM_LAYERS):
        assert sum(cells["hits"][layer]) == cache["per_layer"][layer]["hits"]
        assert sum(cells["misses"][layer]) == cache["per_layer"][layer]["misses"]
    asked = cache["hits"] + cache["misses"]
    assert f"{cache['hits']} hits and {cache['misses']} misses of {asked} expert uses" in read.text
    assert f"{2 * (num_tokens - 1)} decode steps of {2 * (num_tokens - 1)} tokens" in read.text
    assert format_bytes(cache["bytes_read"]) in read.text
    assert found["settings"]["report"] == str(path)
    assert "hello" not in read.text


def test_what_a_machine_should_take_stands_beside_what_it_took(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Law: the simulator sees the hits and misses that the run had."""
    path = tmp_path / "run.html"
    hardware = Path(__file__).resolve().parents[2] / "configs/hardware/2-core-epyc.yaml"
    outcome = run_here(
        capsys, "generate", model, "--prompt", "hello", "--json", "--expert-memory", "50%",
        "--max-new-tokens", "12", "--no-warm-start", "--report", path, "--hardware", hardware,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    cache = json.loads(outcome.out)["cache"]
    rows = re.findall(r"<tr>(.*?)</tr>", path.read_text())
    told = {cells[0]: cells[1:] for cells in (re.findall(r">([^<]*)</t[hd]>", r) for r in rows)}
    for name in ("hits", "misses"):
        assert told[name] == [str(cache[name]), str(cache[name]), "1.00"]
    predicted, measured, _ = told["milliseconds a decode step"]
    assert float(predicted) > 0.0
    assert float(measured) > 0.0


def test_bad_requests_are_refused_before_any_work(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ("generate", model, "--prompt", "hello")
    missing = tmp_path / "no" / "run.html"
    assert "there is no folder" in run_here(capsys, *run, "--report", missing).error()
    assert "is a folder" in run_here(capsys, *run, "--report", tmp_path).error()
    page = tmp_path / "run.html"
    hardware = tmp_path / "none.yaml"
    assert "add --report" in run_here(capsys, *run, "--hardware", hardware).error()
    outcome = run_here(capsys, *run, "--report", page, "--hardware", hardware)
    assert str(hardware) in outcome.error()
    outcome = run_here(capsys, *run, "--report", page, "--dispatch", "auto")
    assert "leave out one of them" in outcome.error()
    assert not page.exists()
