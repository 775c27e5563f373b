"""Shows a generation that several ranks ran together; rank 0 speaks for all."""

import os
from pathlib import Path

import typer
from rich.table import Table

from moe_runtime.cli.generation_view import verdict, warn_if_cut_short
from moe_runtime.cli.terminal import Terminal
from moe_runtime.expert_memory import format_bytes
from moe_runtime.measure.completion import Completion
from moe_runtime.measure.generation_request import GenerationRequest
from moe_runtime.measure.parallel_generation import ParallelGeneration
from moe_runtime.measure.parallel_run import run_parallel_generation
from moe_runtime.measure.prompt import Prompt

_TERMINATED = 143  # 128 + SIGTERM, as shells count


def generate_on_ranks_and_show(request: GenerationRequest, terminal: Terminal) -> None:
    """Run `request` with the other ranks; rank 0 writes texts and figures, in input order."""
    is_first = os.environ.get("RANK", "0") == "0"
    with terminal.warnings_as_remarks():
        generation = run_parallel_generation(request, _View(request, terminal))
    if is_first and terminal.as_json:
        terminal.show_json(generation.as_dict())
    elif is_first:
        for result in generation.results:
            terminal.write(f"\n{result['prompt']}", style="bold cyan")
            terminal.write(f"{result['text']}\n")
        terminal.write("\n")
        terminal.show(_figures(generation))
    if generation.is_terminated:
        raise typer.Exit(_TERMINATED)
    generation.require_parity()


class _View:
    """Says on stderr what each rank holds, and which prompts its context cuts short."""

    def __init__(self, request: GenerationRequest, terminal: Terminal) -> None:
        self._request = request
        self._terminal = terminal

    def on_loading(self, done: int, total: int) -> None:
        pass

    def on_loaded(self, placement: str) -> None:
        self._terminal.remark(f"{Path(self._request.model).name}: {placement}")

    def on_prompt(self, prompt: Prompt) -> None:
        warn_if_cut_short(self._terminal, self._request, prompt)

    def on_text(self, text: str) -> None:
        pass

    def on_completion(self, completion: Completion) -> None:
        pass

    def on_check(self) -> None:
        self._terminal.remark("running the unmodified model for comparison")


def _figures(generation: ParallelGeneration) -> Table:
    traffic = generation.traffic()
    table = Table(show_header=False)
    table.add_row("new tokens", f"{generation.num_tokens} for {len(generation.results)} prompts")
    table.add_row("ranks", f"{traffic['ranks']} on {traffic['nodes']} node(s)")
    chosen = traffic["chosen"]
    said = "" if chosen is None else "".join(f", {n} {name}" for name, n in chosen.items())
    if traffic["payload"] != "exact":
        said += f", rounded to {traffic['payload']}"
    table.add_row("dispatch", f"{traffic['dispatch']}{said}")
    if set(traffic["forwards_by_chunks"]) != {"1"}:
        chunks = ", ".join(f"{n} in {r}" for r, n in traffic["forwards_by_chunks"].items())
        table.add_row("forwards by chunks", chunks)
    for rank, one in enumerate(generation.by_rank):
        cache, memory = one["report"]["cache"], one["report"]["memory"]
        hits = cache["hit_rate"]
        table.add_row(
            f"rank {rank}",
            f"{traffic['experts_held'][rank]} experts, "
            f"{format_bytes(memory['expert_total_bytes'])}, {cache['slots']} slots, "
            f"{'no use' if hits is None else f'{hits:.1%} hits'}, read "
            f"{format_bytes(cache['bytes_read'])}, sent "
            f"{format_bytes(sum(traffic['bytes'][rank]))}, "
            f"{_memory(one['resident'])}",
        )
    table.add_row(
        "moved by MoE layers",
        f"{format_bytes(traffic['moe_bytes'])} counted, "
        f"{format_bytes(traffic['moe_predicted_bytes'])} by formula",
    )
    for name in ("context", "attention"):
        if traffic[f"{name}_bytes"]:
            table.add_row(f"of these for {name}", format_bytes(traffic[f"{name}_bytes"]))
    if traffic["migrations"]:
        table.add_row(
            "moved to the new placement",
            f"{traffic['experts_moved']} experts, {format_bytes(traffic['migration_bytes'])}",
        )
    table.add_row("between nodes", format_bytes(traffic["bytes_between_nodes"]))
    rates = traffic["local_activation_rate"]
    if rates is not None:
        shares = ", ".join(
            f"{rates[kind]:.1%} of {kind} ids" for kind in ("seen", "unseen") if rates[kind]
        )
        even = f"equal parts would have {rates['of_equal_parts']:.1%}"
        table.add_row("experts where tokens wait", f"{shares}; {even}")
    if generation.request.check:
        table.add_row("agrees with unmodified model", verdict(generation.parity))
    return table


def _memory(resident: dict[str, int | None]) -> str:
    """What a rank took beside its imports, and what the system says that it read."""
    peak, before = resident["peak_rss_bytes"], resident["rss_after_imports_bytes"]
    assert peak is not None
    assert before is not None
    read = resident["read_from_disk_bytes"]
    from_disk = "" if read is None else f", {format_bytes(read)} from disk in all"
    return f"peak {format_bytes(peak - before)} over imports{from_disk}"
