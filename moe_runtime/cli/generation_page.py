"""What of a generation stands in its report page."""

from pathlib import Path

from moe_runtime.expert_memory import format_bytes
from moe_runtime.measure.generation import Generation
from moe_runtime.measure.run_prediction import RunPrediction
from moe_runtime.recording.run_record import DISK, RunRecord
from moe_runtime.report.page import Comparison, Page

_PROMPT_HEAD = ("prompt", "tokens", "new tokens", "ended by", "first token", "decode")


def generation_page(generation: Generation, record: RunRecord) -> Page:
    """Figures, and how each prompt went; neither prompts nor texts, as pages are passed on."""
    request, cache = generation.request, generation.report["cache"]
    folder = Path(request.model)
    speed = generation.decode_tokens_per_second
    hit_rate = cache["hit_rate"]
    figures = [
        ("tokens/s, decoding", "-" if speed is None else f"{speed:.1f}"),
        ("time to first token", f"{generation.time_to_first_token_seconds:.3f} s"),
        ("new tokens", str(generation.num_tokens)),
        ("hit rate", "-" if hit_rate is None else f"{hit_rate:.1%}"),
        ("read from disk a token", format_bytes(cache["bytes_read"] / generation.num_tokens)),
        ("peak memory of the process", format_bytes(generation.resident.peak_rss_bytes)),
    ]
    prompts = [
        (
            completion.prompt.index,
            len(completion.prompt.token_ids),
            len(completion.token_ids),
            completion.finish_reason,
            f"{completion.first_token_seconds:.3f} s",
            f"{completion.decode_seconds:.3f} s",
        )
        for completion in generation.completions
    ]
    return Page(
        title=folder.resolve().name if folder.is_dir() else request.model,
        record=record,
        report=generation.report,
        figures=figures,
        prompts=prompts,
        prompt_head=_PROMPT_HEAD,
        comparison=_comparison(generation, record),
        settings=generation.settings(),
        environment=generation.environment(),
    )


def _comparison(generation: Generation, record: RunRecord) -> Comparison | None:
    hardware = generation.request.hardware
    found = generation.prediction
    if found is None:
        return None
    rows = [
        _row("milliseconds a decode step", 1e3 * found.predicted_step_seconds,
             1e3 * found.measured_step_seconds, ".2f"),
    ]  # fmt: skip
    if found.is_whole:
        rows += [
            _row("hits", found.predicted_hits, record.num_hits, "d"),
            _row("misses", found.predicted_misses, record.num_misses, "d"),
            _row("seconds of disk reads", found.predicted_disk_seconds,
                 record.lane_seconds[DISK], ".3f"),
        ]  # fmt: skip
    return Comparison(rows=rows, remark=_remark(found, str(hardware)))


def _row(name: str, predicted: float, measured: float, form: str) -> tuple[str, str, str, str]:
    ratio = f"{predicted / measured:.2f}" if measured else "-"
    return name, f"{predicted:{form}}", f"{measured:{form}}", ratio


def _remark(found: RunPrediction, hardware: str) -> str:
    which = "all" if found.is_whole else "the first"
    return (
        f"By the rates of {hardware}, over {which} {found.num_steps} decode steps: the simulator "
        "plays the experts that this run asked for, from an empty cache and with nothing read "
        "ahead; attention over the context is not counted."
    )
