"""Laws of charts: a file in the format its name asks for, with every policy in it."""

import re
from pathlib import Path

import pytest

from moe_runtime.report.plots import check_plot_name, plot_hit_rates
from moe_runtime.simulate.replay import simulate
from tests.simulate.traces import make_trace

STARTS = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}


@pytest.mark.parametrize("slots", [[5], [2, 6, 10, 24]])
@pytest.mark.parametrize("suffix", STARTS)
def test_a_chart_is_what_its_name_says(suffix: str, slots: list[int], tmp_path: Path) -> None:
    """Law: one size or many, the file is of the format of its ending."""
    path = tmp_path / f"hit_rate{suffix}"
    results = simulate(make_trace(0, num_tokens=30), slots=slots)
    plot_hit_rates(results, path, title="tiny", num_experts=24, floor=6)
    assert path.read_bytes().startswith(STARTS[suffix])


def test_a_chart_names_policies_axes_and_model(tmp_path: Path) -> None:
    """Law: what is drawn can be read without the command that drew it."""
    path = tmp_path / "hit_rate.svg"
    results = simulate(make_trace(0, num_tokens=30), slots=[6, 12])
    plot_hit_rates(results, path, title="tiny model, 30 tokens", num_experts=24, floor=6)
    comments = re.findall("<!-- (.*?) -->", path.read_text())
    for text in (
        "Belady, the bound",
        "LRU",
        "LFU",
        "static, of this very trace",
        "tiny model, 30 tokens",
        "slots, shared by all layers",
        "share of all 24 experts",
        "experts of one token",
    ):
        assert text in comments


def test_other_endings_are_refused() -> None:
    """Law: a name without a known format is refused, with one that has."""
    with pytest.raises(ValueError, match=r"ends in none of \.png, \.svg, \.pdf; name it hits\.txt"):
        check_plot_name(Path("hits.txt"))
