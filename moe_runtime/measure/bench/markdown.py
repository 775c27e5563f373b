"""The report as a page for `docs/benchmarks/`, and its tables as cells for any other form."""

from typing import Any

from moe_runtime.expert_memory import format_bytes
from moe_runtime.measure.bench.report import Caps, Outcome, Report, Row, Table
from moe_runtime.measure.spread import Spread

COLUMNS = (
    "contestant",
    "ms per token",
    "time / ours",
    "read per token",
    "hit rate",
    "peak memory",
    "cap",
    "tokens",
    "outputs",
)


def as_markdown(report: Report) -> str:
    """The whole page."""
    lines = [
        f"# Offload benchmark, {report.model['name']}",
        "",
        f"`{report.command}`",
        "",
        *(f"- {line}" for line in heading(report)),
        "",
        "Forced tokens, one at a time; contestants are processes of their own and take turns round "
        "by round, the first third of the rounds warms up. Median (quartiles) of the tokens; time "
        "/ ours is paired by round. Outputs are compared with those of unmodified transformers, "
        "eager, before any speed. Read per token is what the block layer read for the process.",
    ]
    for table in report.tables:
        lines += ["", f"## {title(table)}", "", *_grid([COLUMNS, *map(cells, table.rows)])]
        lines += ["", *(f"- {line}" for line in remarks(table))]
    if report.comparisons:
        lines += ["", "## Routings compared", ""]
        lines += [f"- {line}" for line in comparison_lines(report)]
    return "\n".join(lines) + "\n"


def heading(report: Report) -> list[str]:
    """Model, machine, versions, commit."""
    model, machine = report.model, report.machine
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return [
        f"model: {model['family']}, {model['dtype']}, {model['layers']} MoE layers x "
        f"{model['experts_per_layer']} experts of {_mb(model['expert_bytes'])}, "
        f"top-{model['top_k']}; {_gb(model['checkpoint_bytes'])}, of which "
        f"{_gb(model['expert_total_bytes'])} experts"
        + (f"; {model['remark']}" if model["remark"] else ""),
        f"machine: {machine['cpu']}, {machine['cores']} cores, "
        f"{format_bytes(machine['memory_bytes'])}, Linux {machine['kernel']}, "
        + (f"{machine['gpu']}, " if machine["gpu"] else "")
        + f"read-ahead {_read_ahead(machine)}",
        f"versions: {versions}",
        f"commit: {report.commit or 'not a checkout'}",
    ]


def title(table: Table) -> str:
    """Residency, routing and memory in one line."""
    return (
        f"{100 * table.residency:g}% of the weights in {_memory(table)}, {table.routing} routing, "
        f"{_caps(table)}"
    )


def cells(row: Row) -> tuple[str, ...]:
    """One row under COLUMNS."""
    outputs = row.gate.text() if row.gate is not None else ""
    if row.outcome is not Outcome.MEASURED:
        return (row.title, str(row.outcome), *[""] * (len(COLUMNS) - 3), outputs)
    peak = row.peak_memory_bytes if row.cap_bytes is not None else row.peak_resident_bytes
    return (
        row.title,
        "" if row.ms_per_token is None else spread(row.ms_per_token, 1),
        "" if row.times_ours is None else spread(row.times_ours, 2),
        "" if row.bytes_read_per_token is None else _mb(row.bytes_read_per_token),
        "" if row.hit_rate is None else f"{row.hit_rate:.3f}",
        "" if peak is None else _gb(peak),
        _cap(row),
        str(row.num_tokens),
        outputs,
    )


def remarks(table: Table) -> list[str]:
    """What stands below a table."""
    lines = [f"{row.title}: {row.outcome}: {row.note}" for row in table.rows if row.note]
    for row in table.rows:
        known = {"loaded", "repaired", "weights"} & row.facts.keys()
        lines += [f"{row.title}: {name} {row.facts[name]}" for name in sorted(known)]
        if "device_bytes" in row.facts:
            lines.append(f"{row.title}: {_gb(row.facts['device_bytes'])} on the GPU once loaded")
    lines.append(f"step with the experts as a no-op: {spread(table.no_experts_ms, 1)} ms")
    lines.append(f"other programs kept {table.other_cores:.2f} cores busy meanwhile")
    if table.resident_ms is not None:
        lines.append(
            "step of transformers with all experts on the GPU, grouped_mm: "
            f"{spread(table.resident_ms, 1)} ms"
        )
    if table.link_gbps is not None:
        lines.append(
            "copies of pinned memory over the link, right before and after our turns: "
            f"{spread(table.link_gbps, 2)} GB/s"
        )
    if table.direct_read_gbps is not None:
        settings = ", ".join(
            f"{one['blocks_at_a_time']} x {one['block_bytes'] / 2**20:.0f} MiB {one['gbps']:.2f}"
            for one in table.direct_reads
        )
        lines.append(
            "direct reads at random places of the same files, right before and after our turns: "
            f"{spread(table.direct_read_gbps, 2)} GB/s (tried: {settings})"
        )
    ours = table.ours
    if ours.bytes_missed_per_token is not None:
        read = ours.bytes_read_over_missed
        lines.append(
            f"moe_runtime: {ours.facts['slots']} slots ({ours.facts['policy']}), missed "
            f"{_mb(ours.bytes_missed_per_token)} per token"
            + ("" if read is None else f", bytes read / missed {read:.4f}")
        )
    if table.ceiling is not None:
        lines.append(
            f"ceiling, what {_limits(table)} alone would take: "
            f"{spread(table.ceiling.ms_per_token, 1)} ms; moe_runtime takes "
            f"{spread(table.ceiling.ratio, 2)} times that"
        )
    if table.prediction is not None:
        found = table.prediction
        timed = "" if found.ms_per_token is None else f", {found.ms_per_token:.1f} ms per token"
        measured = "nothing" if ours.hit_rate is None else f"{ours.hit_rate:.4f}"
        lines.append(
            f"simulated: hit rate {found.hit_rate:.4f}{timed}; measured: hit rate {measured}"
        )
    if table.caps is Caps.IMPOSSIBLE:
        lines.append(
            "capped: false; memory could not be capped here, so no ratio is given "
            "(run as root, or where cgroup v2 delegates memory)"
        )
    return lines


def comparison_lines(report: Report) -> list[str]:
    """How much faster ours is with one routing than with another, measured and predicted."""
    return [
        f"{found.residency:.0%}: {found.slow} takes {found.measured:.2f} times as long as "
        f"{found.fast}; predicted {found.predicted:.2f} "
        f"({'within' if found.is_as_predicted else 'not within'} 10 %)"
        for found in report.comparisons
    ]


def spread(found: Spread, digits: int) -> str:
    """`12.3 (11.9 to 13.0)`."""
    median, low, high = (f"{value:.{digits}f}" for value in (found.median, found.low, found.high))
    return f"{median} ({low} to {high})"


def _cap(row: Row) -> str:
    if "device_bytes" in row.facts:
        return ""  # of the GPU's memory, and the same for all: the title says it
    return "none" if row.cap_bytes is None else _gb(row.cap_bytes)


def _memory(table: Table) -> str:
    return "memory" if table.device == "cpu" else f"the memory of {table.device}"


def _limits(table: Table) -> str:
    return "disk and dense layers" if table.device == "cpu" else "the link and a resident step"


def _caps(table: Table) -> str:
    if table.caps is Caps.NOT_NEEDED:
        return "no caps, as nobody needs one"
    if table.caps is Caps.IMPOSSIBLE:
        return "no caps, as none can be set"
    if table.device != "cpu":
        return f"torch's allocator capped at {_gb(table.weight_bytes)} and a little for activations"
    over = "its own memory" if table.totals == "weights" else "the largest own memory, for all"
    return f"capped at {_gb(table.weight_bytes)} + {over}"


def _grid(rows: list[tuple[str, ...]]) -> list[str]:
    header, *body = (f"| {' | '.join(row)} |" for row in rows)
    return [header, "|" + "---|" * len(COLUMNS), *body]


def _read_ahead(machine: dict[str, Any]) -> str:
    """Peers that map files depend on it: too much of it reads what nobody asked for."""
    kib = machine["read_ahead_kib"]
    return "unknown" if kib is None else f"{kib} KiB"


def _mb(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:.1f} MB"


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
