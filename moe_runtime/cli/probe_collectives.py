"""Shows what messages between ranks cost; rank 0 speaks for all."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from moe_runtime.cli.terminal import Terminal

if TYPE_CHECKING:
    from moe_runtime.perf.interconnect import Interconnect


def probe_collectives_and_show(terminal: Terminal, output: Path | None) -> None:
    """Measure with the other ranks; rank 0 writes `output` and the fits."""
    is_first = os.environ.get("RANK", "0") == "0"
    with terminal.waiting("starting") as status:
        from moe_runtime.measure.probe.collectives import join_ranks, probe_collectives

        world = join_ranks()
        is_together = False
        try:
            found = probe_collectives(
                world, on_progress=lambda part: status.update(Text(part, style="dim"))
            )
            is_together = True
        finally:
            world.close(orderly=is_together)
    if not is_first:
        return
    if output is not None:
        found.save(output)
    if terminal.as_json:
        terminal.show_json(found.as_dict() | {"measured_on": str(found.measured_on)})
    else:
        terminal.show(_table(found))
    if output is not None:
        terminal.remark(f"wrote {output}")


def _table(found: "Interconnect") -> Table:
    table = Table(
        title=f"{found.ranks} ranks on {found.nodes} node(s), {found.backend}, {found.device}",
        title_justify="left",
    )
    table.add_column("what")
    for name in ("start", "then", "r squared"):
        table.add_column(name, justify="right")
    for name in ("all_to_all", "all_gather", "reduce_scatter", "within_node", "between_nodes"):
        fit = getattr(found, name)
        if fit is None:
            continue
        rate = f"{1e-9 / fit.beta_seconds:.3g} GB/s" if fit.beta_seconds else ""
        table.add_row(name, f"{1e6 * fit.alpha_seconds:.3g} us", rate, f"{fit.r_squared:.4f}")
    fit = found.product
    rate = f"{1e-9 / fit.beta_seconds:.3g} GFLOP/s" if fit.beta_seconds else ""
    outputs, inputs = found.weight_shape
    name = f"product with {outputs} x {inputs} {found.dtype}"
    table.add_row(name, f"{1e6 * fit.alpha_seconds:.3g} us", rate, f"{fit.r_squared:.4f}")
    return table
