"""How commands of `moe-runtime placement` show figures: as tables, and for `--json`."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.table import Table

from moe_runtime.cli.terminal import Terminal

if TYPE_CHECKING:
    from moe_runtime.placement.evaluate import Evaluation
    from moe_runtime.placement.routing_counts import RoutingCounts

# Figure of an Evaluation, what a person calls it, and how it is written.
FIGURES = (
    ("crossings_per_token", "crossings a token", "{:.3f}"),
    ("crossing_fraction", "crossings, of transitions", "{:.4f}"),
    ("inter_node_fraction", "between nodes, of transitions", "{:.4f}"),
    ("fanout", "GPUs a token and layer", "{:.3f}"),
    ("load_max_over_mean", "busiest GPU over mean", "{:.3f}"),
    ("load_max_over_mean_256", "the same, 256 tokens at a time", "{:.3f}"),
    ("imbalance_ratio", "imbalance, (max - mean) / mean", "{:.3f}"),
    ("local_activation_rate", "activations that stay on their GPU", "{:.4f}"),
)
_LAYER_FIGURES = (
    "layer",
    "layer_id",
    "crossing_fraction",
    "inter_node_fraction",
    "fanout",
    "load_max_over_mean",
    "load_max_over_mean_256",
    "local_activation_rate",
)


def evaluation_as_dict(found: "Evaluation", *, with_layers: bool = True) -> dict[str, Any]:
    """Figures, `traffic` between GPUs in transitions, `per_layer`, and the same by domain."""
    facts: dict[str, Any] = {"num_tokens": found.num_tokens}
    facts |= {name: getattr(found, name) for name, _, _ in FIGURES}
    facts["cost_per_transition"] = found.cost_per_transition
    if with_layers:
        facts["traffic"] = found.traffic.tolist()
        facts["per_layer"] = [
            {name: getattr(layer, name) for name in _LAYER_FIGURES}
            | {"gpu_load": list(layer.gpu_load)}
            for layer in found.per_layer
        ]
        facts["per_domain"] = {
            name: evaluation_as_dict(domain, with_layers=False)
            for name, domain in found.per_domain.items()
        }
    return facts


def figures_table(columns: "Mapping[str, Evaluation]", title: str) -> Table:
    """A row a figure, a column an evaluation."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    table.add_row("tokens", *(f"{found.num_tokens:,}" for found in columns.values()))
    for figure, label, form in FIGURES:
        values = [form.format(getattr(found, figure)) for found in columns.values()]
        table.add_row(label, *values)
    return table


def show_domains(terminal: Terminal, found: "Evaluation", title: str) -> None:
    """A column a domain, where there is more than one."""
    if len(found.per_domain) > 1:
        named = {name or "(no domain)": domain for name, domain in found.per_domain.items()}
        terminal.show(figures_table(named, title))


def warn_of_few_tokens(terminal: Terminal, counts: "RoutingCounts") -> list[str]:
    """Say where there is too little to learn from."""
    if not counts.is_scant:
        return []
    sentence = (
        f"{counts.num_tokens:,} tokens are fewer than 100 for each of the {counts.num_experts} "
        "experts: the placement will fit these tokens better than others; record more"
    )
    terminal.warn(sentence)
    return [sentence]


def warn_of_load(terminal: Terminal, found: "Evaluation", limit: float, where: str) -> list[str]:
    """Say where the load is above the limit that the solver kept on its own tokens."""
    sentences = []
    if found.load_max_over_mean > limit:
        worst = max(found.per_layer, key=lambda layer: layer.load_max_over_mean)
        sentences.append(
            f"on {where} the busiest GPU has {found.load_max_over_mean:.3f} of the mean load, "
            f"above the limit {limit:g} (worst in layer {worst.layer_id}: "
            f"{worst.load_max_over_mean:.3f})"
        )
    above = {
        name or "(no domain)": domain.load_max_over_mean
        for name, domain in found.per_domain.items()
        if domain.load_max_over_mean > limit and len(found.per_domain) > 1
    }
    if above:
        listed = ", ".join(f"{name} {load:.3f}" for name, load in above.items())
        sentences.append(
            f"on {where} some domains alone are above the limit {limit:g}: {listed}; --weight "
            "counts a domain more"
        )
    for sentence in sentences:
        terminal.warn(sentence)
    return sentences
