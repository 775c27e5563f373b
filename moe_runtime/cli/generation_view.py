"""Shows a generation in the terminal while it runs, and its figures afterwards."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.table import Table

from moe_runtime.cli.generation_page import generation_page
from moe_runtime.cli.loading_view import LoadingView
from moe_runtime.cli.terminal import Terminal
from moe_runtime.expert_memory import format_bytes
from moe_runtime.measure.completion import Completion
from moe_runtime.measure.generation import Generation, run_generation
from moe_runtime.measure.generation_request import GenerationRequest
from moe_runtime.measure.parity import Parity
from moe_runtime.measure.prompt import Prompt
from moe_runtime.report.page import write_page


def generate_and_show(request: GenerationRequest, terminal: Terminal) -> None:
    """Run `request`, show its text and figures, and raise ParityError if its check fails."""
    with terminal.warnings_as_remarks(), ExitStack() as on_screen:
        generation = run_generation(request, _View(request, terminal, on_screen))
    if terminal.as_json:
        terminal.show_json(generation.as_dict())
    else:
        terminal.write("\n")
        terminal.show(_figures(generation))
    if generation.record is not None:
        assert request.report is not None
        page = generation_page(generation, generation.record)
        write_page(page, Path(request.report))
        terminal.remark(f"the report of this run is in {request.report}")
    generation.require_parity()


class _View(LoadingView):
    """Writes what happens."""

    def __init__(
        self, request: GenerationRequest, terminal: Terminal, on_screen: ExitStack
    ) -> None:
        super().__init__(terminal, on_screen)
        self._request = request

    def on_loaded(self, placement: str) -> None:
        model = self._request.model
        name = Path(model).name if Path(model).is_dir() else model
        super().on_loaded(f"{name or model}: {placement}")

    def on_prompt(self, prompt: Prompt) -> None:
        warn_if_cut_short(self.terminal, self._request, prompt)
        self.terminal.write(f"\n{prompt.text}", style="bold cyan")

    def on_text(self, text: str) -> None:
        self.terminal.write(text)

    def on_completion(self, completion: Completion) -> None:
        self.terminal.write("\n")

    def on_check(self) -> None:
        self.on_screen.close()  # it is said once more when the other process starts
        self.on_screen.enter_context(
            self.terminal.waiting("running the unmodified model for comparison")
        )


def _figures(generation: Generation) -> Table:
    cache, memory = generation.report["cache"], generation.report["memory"]
    resident = generation.resident
    table = Table(show_header=False)
    num_prompts = len(generation.completions)
    table.add_row("new tokens", f"{generation.num_tokens} for {_count(num_prompts, 'prompt')}")
    speed = generation.decode_tokens_per_second
    table.add_row("decode", "-" if speed is None else f"{speed:.1f} tokens/s")
    first = f"{generation.time_to_first_token_seconds:.3f} s"
    table.add_row("time to first token", first if num_prompts == 1 else f"{first} (median)")
    table.add_row(
        "expert cache",
        f"{cache['hit_rate']:.1%} hits ({cache['policy']}, {cache['slots']} slots of "
        f"{format_bytes(cache['slot_bytes'])})",
    )
    table.add_row("reading ahead", _reading_ahead(generation.report["prediction"]))
    read = cache["bytes_read"] / generation.num_tokens
    table.add_row("read from disk", f"{format_bytes(read)} a token")
    tiers = generation.report["tiers"]
    if tiers is not None:
        table.add_row(
            "missing experts",
            f"{tiers['misses_copied']} copied, {tiers['misses_computed']} computed on the CPU, "
            f"{format_bytes(tiers['bytes_copied'] / generation.num_tokens)} copied a token",
        )
    table.add_row(
        "expert memory",
        f"{format_bytes(memory['expert_budget_bytes'])} for experts of "
        f"{format_bytes(memory['expert_total_bytes'])}",
    )
    table.add_row(
        "memory of the process",
        f"{format_bytes(resident.peak_rss_bytes)} at most, "
        f"{format_bytes(resident.rss_after_imports_bytes)} of it Python and its libraries",
    )
    if generation.request.check:
        table.add_row("agrees with unmodified model", verdict(generation.parity))
    return table


def warn_if_cut_short(terminal: Terminal, request: GenerationRequest, prompt: Prompt) -> None:
    """Say so where the model's context has less room than was asked for."""
    wanted = request.decoding.max_new_tokens
    if prompt.max_new_tokens < wanted:
        terminal.warn(
            f"prompt {prompt.index} has {len(prompt.token_ids)} tokens, so the model's context "
            f"has room for {prompt.max_new_tokens} new ones, not {wanted}"
        )


def verdict(parity: Parity | None) -> str:
    """What a check found, for a table; None where it did not come to an end."""
    if parity is None:
        return "[red]not known[/red]"
    colour, word = ("green", "yes") if parity.is_right else ("red", "no")
    return f"[{colour}]{word}[/{colour}], {parity.text()}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _reading_ahead(prediction: dict[str, Any]) -> str:
    """What was expected, what came of it, and why it is on or off."""
    if prediction["predictor"] is None:
        return f"off: {prediction['why']}"
    return (
        f"{prediction['mode']} ({prediction['predictor']}): {prediction['why']}; expected "
        f"{prediction['expected_gain_ms_per_layer']:.3f} and realised "
        f"{prediction['realised_gain_ms_per_layer']:.3f} ms a layer, "
        f"{prediction['used']} of {prediction['reads_ahead']} reads used, "
        f"{format_bytes(prediction['wasted_bytes'])} wasted"
    )
