"""One run as one HTML file: no network, no other file, everything escaped."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_runtime.config import write_whole
from moe_runtime.expert_memory import format_bytes
from moe_runtime.recording.run_record import DENSE, EXPERTS, PLAN, WAIT, RunRecord
from moe_runtime.report.heat_map import heat_map
from moe_runtime.report.lane_chart import NAMES, lanes_overview, last_forwards
from moe_runtime.report.line_chart import line_chart
from moe_runtime.report.markup import Markup, table, tag
from moe_runtime.report.page_style import SCRIPT, STYLE

# Nothing is fetched, whatever stands in the page.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_COMPUTING = (DENSE, EXPERTS, PLAN, WAIT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Rows (what, predicted, measured, their ratio), and what the prediction assumes."""

    rows: Sequence[tuple[str, str, str, str]]
    remark: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What stands in the page. `report` is that of the model's handle, over the same run."""

    title: str
    record: RunRecord
    report: Mapping[str, Any]
    figures: Sequence[tuple[str, str]] = ()  # what, and how much, shown first
    prompts: Sequence[tuple[object, ...]] = ()  # rows of a table
    prompt_head: tuple[str, ...] = ()
    comparison: Comparison | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    environment: Mapping[str, object] = field(default_factory=dict)


def write_page(page: Page, path: Path) -> None:
    """Render `page` into `path`: all of it, or nothing. Raises OSError with the remedy."""
    try:
        write_whole(path, render_page(page))
    except OSError as error:
        raise OSError(
            error.errno, f"report {path} cannot be written: {error.strerror}; free space there"
        ) from error


def render_page(page: Page) -> str:
    """A whole HTML document."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{page.title}: a run of moe_runtime"),
        tag("style", Markup(STYLE)),
    )
    body = tag(
        "body",
        tag("header", tag("h1", page.title), tag("button", "light / dark", type="button")),
        _tiles(page.figures),
        *_sections(page),
        tag("script", Markup(SCRIPT)),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _sections(page: Page) -> list[Markup]:
    record = page.record
    parts = [_time(record)] if record.num_forwards else [tag("p", "No forward was recorded.")]
    if record.num_forwards:
        parts += [_lanes(record), _cache(page)]
    parts += [_bytes(page.report)]
    if page.comparison is not None:
        parts.append(_section(
            "Predicted and measured",
            page.comparison.remark,
            table(page.comparison.rows, head=("", "predicted", "measured", "ratio")),
        ))  # fmt: skip
    if page.prompts:
        parts.append(_section("Prompts", "", table(page.prompts, head=page.prompt_head)))
    for name, mapping in (("Settings", page.settings), ("Environment", page.environment)):
        if mapping:
            parts.append(tag("details", tag("summary", name), table(_flat(mapping))))
    return parts


def _tiles(figures: Sequence[tuple[str, str]]) -> Markup:
    tiles = [tag("div", tag("b", value), tag("span", name)) for name, value in figures]
    return tag("div", *tiles, class_="tiles")


def _section(name: str, remark: str, *parts: Markup) -> Markup:
    return tag("section", tag("h2", name), *([tag("p", remark)] if remark else []), *parts)


def _time(record: RunRecord) -> Markup:
    seconds = {lane: record.lane_seconds[lane] for lane in _COMPUTING}
    whole = sum(seconds.values()) or 1.0
    bar = [
        tag("div", class_=lane, style=f"width:{100 * each / whole:.3f}%", title=NAMES[lane])
        for lane, each in seconds.items()
    ]
    key = [
        tag("span", tag("i", class_=lane), f"{NAMES[lane]} {each:.3f} s, {each / whole:.1%}")
        for lane, each in seconds.items()
    ]
    forwards = record.prefill, record.decode
    remark = "; ".join(
        f"{each.num_forwards} {name} of {each.num_tokens} tokens in {each.seconds:.3f} s"
        for name, each in zip(("forwards over prompts", "decode steps"), forwards, strict=True)
    )
    return _section(
        "Where the time went",
        f"Of the thread that computes. {remark}.",
        tag("div", *bar, class_="share"),
        tag("div", *key, class_="key"),
    )


def _lanes(record: RunRecord) -> Markup:
    rates = [each / record.bin_seconds / 1e9 for each in record.bytes_read_S]
    parts = [
        lanes_overview(record),
        tag("p", "Read from disk, GB/s"),
        line_chart(
            rates,
            width=record.bin_seconds,
            last=max(record.seconds, record.bin_seconds),
            unit="seconds",
            label="bytes read from disk over time",
        ),
    ]
    if record.recent_forwards:
        parts += [tag("p", "The last forwards, every stretch of every lane"), last_forwards(record)]
    remark = "A row is as high as the share of the time in which its lane was busy."
    return _section("Lanes over time", remark, *parts)


def _cache(page: Page) -> Markup:
    record = page.record
    hits, misses = record.hits_LB.sum(axis=0), record.misses_LB.sum(axis=0)
    shares = [
        float(hit / (hit + miss)) if hit + miss else None
        for hit, miss in zip(hits, misses, strict=True)
    ]
    num_forwards, width = record.num_forwards, record.forwards_per_bin
    counts = [
        min(width, num_forwards - index * width) for index in range(len(record.forward_seconds_B))
    ]
    milliseconds = [
        1e3 * float(seconds) / count
        for seconds, count in zip(record.forward_seconds_B, counts, strict=True)
    ]
    across = {"width": float(width), "last": float(num_forwards), "unit": "forward"}
    asked = record.num_hits + record.num_misses
    cache = page.report["cache"]
    return _section(
        "Experts held when asked for",
        f"{record.num_hits} hits and {record.num_misses} misses of {asked} expert uses; "
        f"{cache['slots']} slots, {cache['policy']}.",
        heat_map(
            record.hits_LB,
            record.misses_LB,
            forwards_per_bin=width,
            num_forwards=num_forwards,
        ),
        tag("p", "Hit rate over forwards"),
        line_chart(shares, highest=1.0, label="hit rate over forwards", **across),  # type: ignore[arg-type]
        tag("p", "Milliseconds a forward; those over prompts have many tokens"),
        line_chart(milliseconds, label="milliseconds a forward", **across),  # type: ignore[arg-type]
    )


def _bytes(report: Mapping[str, Any]) -> Markup:
    cache, memory, tiers = report["cache"], report["memory"], report["tiers"]
    held = cache["hits"] * cache["slot_bytes"]
    rows: list[tuple[object, ...]] = [
        ("experts used from slots that held them", format_bytes(held)),
        ("read from disk", format_bytes(cache["bytes_read"])),
    ]
    if tiers is not None:
        rows.append(("copied to the GPU", format_bytes(tiers["bytes_copied"])))
    rows += [
        ("slots for experts", format_bytes(memory["expert_used_bytes"])),
        ("all experts", format_bytes(memory["expert_total_bytes"])),
        ("dense weights", format_bytes(memory["dense_bytes"])),
    ]
    return _section("Bytes by tier", "", table(rows))


def _flat(mapping: Mapping[str, object], before: str = "") -> list[tuple[object, ...]]:
    """Nested settings as rows, a dot between the names."""
    rows: list[tuple[object, ...]] = []
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{before}{key}.")
        elif isinstance(value, list | tuple):
            rows.append((before + str(key), ", ".join(map(str, value))))
        else:
            rows.append((before + str(key), "-" if value is None else value))
    return rows
