"""`moe-runtime predictor eval`: how right predictors are on sequences they have not seen."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from moe_runtime.cli.options import OUTPUT_PANEL, Json, Revision, TrustRemoteCode
from moe_runtime.cli.outputs import check_writable
from moe_runtime.cli.predictor_options import (
    HeldOut,
    ModelOption,
    SplitSeed,
    TraceFile,
    check_names,
    facts_of,
)
from moe_runtime.cli.terminal import Terminal
from moe_runtime.expert_memory import format_bytes

if TYPE_CHECKING:
    from moe_runtime.predictors.evaluation import Evaluation
    from moe_runtime.predictors.predictor import ModelFacts, Predictor
    from moe_runtime.predictors.split import Split
    from moe_runtime.trace import Trace

EPILOG = """Examples:

moe-runtime predictor eval T.npz --predictors frequency,markov,token_table

moe-runtime predictor eval T.npz --model ./model --plot recall.png --json

moe-runtime predictor eval T.npz --predictors gates.safetensors --max-tokens 2000
"""

_ALL = "all"
_TABLE_WIDTH = 104
_SUFFIX = ".safetensors"
_LEGEND = (
    "recall of a token's experts among the K most probable: 1, 2, 3 layers ahead; step: all layers "
    "before the first one runs; next: of the next token, its id not known. slots: step's recall "
    "among as many experts as the budget holds. B=4, 16: share of the experts that so many tokens "
    "use together. error: of the probabilities, in bins. us: microseconds a token"
)


def eval_(
    trace: TraceFile,
    predictors: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="Names, which are fitted to the sequences that are not held out, or files of "
            "`predictor train`; all that the trace has the fields for by default.",
        ),
    ] = _ALL,
    model: ModelOption = None,
    held_out: HeldOut = 0.2,
    seed: SplitSeed = 0,
    budget: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="Share of a layer's experts that have a slot, for their recall."
        ),
    ] = 0.35,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Judge whole held-out sequences up to so many tokens.")
    ] = 10_000,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png",
            help="Draw recall layer by layer (.png, .svg or .pdf).",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Fit predictors to part of a trace's sequences, and judge them on the others.

    Nobody sees a held-out sequence before it is judged, and then only what a running model would
    have shown by that moment.
    """
    terminal = Terminal(as_json=as_json)
    with terminal.waiting("reading the trace"):
        from moe_runtime.predictors.evaluation import (
            evaluate,
            first_sequences,
            router_input_cosines,
            slots_of_budget,
        )
        from moe_runtime.predictors.registry import PREDICTORS
        from moe_runtime.predictors.split import Split, split_by_sequence
        from moe_runtime.report.predictor_plots import check_plot_name, plot_recall
        from moe_runtime.trace import Trace

        if plot is not None:
            check_plot_name(plot)
            check_writable(plot)
        words = None if predictors == _ALL else [word.strip() for word in predictors.split(",")]
        if words is not None:
            check_names([w for w in words if not w.endswith(_SUFFIX)], list(PREDICTORS))
        loaded = Trace.load(trace)
        split = Split(held_out=held_out, seed=seed)
        to_fit, to_judge = split_by_sequence(loaded, split)
        to_judge = first_sequences(to_judge, max_tokens)
    facts = facts_of(terminal, model, loaded, revision, trust_remote_code)
    if words is None:
        words = _possible(terminal, loaded, facts)
    num_slots = slots_of_budget(budget, loaded.num_experts)
    results: list[Evaluation] = []
    fit_seconds: list[float | None] = []
    for word in dict.fromkeys(words):
        found, seconds = _obtain(terminal, word, to_fit, facts, split)
        with terminal.progress(f"judging {found.name}") as meter:
            results.append(
                evaluate(
                    found,
                    to_judge,
                    num_slots=num_slots,
                    seen_ids=to_fit.token_id,
                    on_progress=meter.update,
                )
            )
        fit_seconds.append(seconds)
    cosines = router_input_cosines(to_judge)
    if plot is not None:
        plot_recall(results, plot, title=f"{loaded.model}, {to_judge.num_tokens:,} unseen tokens")
    if as_json:
        terminal.show_json(
            {
                "model": str(facts.fingerprint),
                "tokens_fitted": to_fit.num_tokens,
                "tokens_judged": to_judge.num_tokens,
                "held_out": held_out,
                "seed": seed,
                "slots_per_layer": num_slots,
                "router_input_cosines": cosines,
                "results": [
                    result.as_dict() | {"fit_seconds": seconds}
                    for result, seconds in zip(results, fit_seconds, strict=True)
                ],
            }
        )
        return
    terminal.show(_table(results, f"{facts.fingerprint}; {num_slots} slots a layer"))
    if cosines:
        terminal.show(_cosine_table(results, cosines))


def _possible(terminal: Terminal, trace: "Trace", facts: "ModelFacts") -> list[str]:
    """The names of all that can be fitted to this trace; the others are remarked on."""
    from moe_runtime.predictors.registry import PREDICTORS

    words = []
    for name, kind in PREDICTORS.items():
        missing = [field for field in sorted(kind.needs) if getattr(trace, field) is None]
        if missing:
            terminal.remark(f"{name} is left out: the trace has no {', '.join(missing)}")
        elif "hidden" in kind.needs and not facts.gates:
            terminal.remark(f"{name} is left out: it needs the model's gates, give --model")
        else:
            words.append(name)
    return words


def _obtain(
    terminal: Terminal,
    word: str,
    to_fit: "Trace",
    facts: "ModelFacts",
    split: "Split",
) -> "tuple[Predictor, float | None]":
    """Load a file, or fit by name; with the seconds that fitting took."""
    from moe_runtime.predictors.registry import PREDICTORS
    from moe_runtime.predictors.store import load_predictor, split_of

    if word.endswith(_SUFFIX):
        found = load_predictor(Path(word), facts.fingerprint)
        if split_of(Path(word)) != split:
            terminal.warn(
                f"{word} was fitted with another split than this one, so it may have seen the "
                "sequences it is judged on; give --held-out and --seed as in `predictor train`"
            )
        return found, None
    started = time.perf_counter()
    with terminal.progress(f"fitting {word}") as meter:
        fitted = PREDICTORS[word].fit(to_fit, facts, meter.update)
    return fitted, time.perf_counter() - started


def _table(results: "list[Evaluation]", title: str) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        caption=_LEGEND,
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        # What does not fit a narrow terminal is better wrapped by it than squeezed away here.
        width=_TABLE_WIDTH,
    )
    table.add_column("predictor")
    table.add_column("phase")
    for name in ("1", "2", "3", "step", "next", "slots", "B=4", "B=16", "error", "us", "size"):
        table.add_column(name, justify="right")
    for result in results:
        for phase in [*result.microseconds, *(part for part in _ID_PARTS if part in result.scores)]:
            scores = result.scores[phase]
            step = scores.get("step")
            cells = [f"{scores[m].recall:.3f}" if m in scores else "-" for m in _MOMENTS]
            if step is None:
                cells += ["-"] * 4
            else:
                batch = [step.batch_recall.get(size) for size in (4, 16)]
                cells += [f"{step.slot_recall:.3f}"]
                cells += ["-" if share is None else f"{share:.3f}" for share in batch]
                cells += [f"{step.calibration_error:.3f}"]
            table.add_row(
                result.predictor,
                phase,
                *cells,
                f"{result.microseconds[phase]:.0f}" if phase in result.microseconds else "-",
                format_bytes(result.state_bytes),
            )
    if results:
        chance = next(iter(results[0].scores["all"].values())).batch_chance
        cells = [f"{chance[1]:.3f}"] * 5 + ["-", f"{chance[4]:.3f}", f"{chance[16]:.3f}"]
        table.add_row("chance", "", *cells, "-", "-", "-", style="dim")
    return table


def _cosine_table(results: "list[Evaluation]", cosines: dict[str, list[float]]) -> Table:
    """How alike the inputs of routers are, beside what gates make of an earlier one."""
    table = Table(
        title="router inputs: mean cosine of a layer's and an earlier one's, and recall from it",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    table.add_column("layers ahead")
    table.add_column("")
    for layer in range(len(cosines["1"]) + 1):
        table.add_column(f"{layer}", justify="right")
    for distance, found in cosines.items():
        gap = ["-"] * int(distance)
        table.add_row(distance, "cosine", *gap, *(f"{cosine:.3f}" for cosine in found))
        for result in results:
            if result.predictor in _GATES:
                recalls = result.layer_recall[distance]
                cells = ["-" if recall is None else f"{recall:.3f}" for recall in recalls]
                table.add_row("", result.predictor, *cells)
    return table


_MOMENTS = ("1", "2", "3", "step", "next")
_ID_PARTS = ("seen ids", "unseen ids")
_GATES = ("gate_lookahead", "gate_corrected")
