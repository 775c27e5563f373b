"""Decode speed of offloaded experts against resident transformers and against the disk."""

import gc
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_runtime.integrations.transformers.handle import handle
from moe_runtime.integrations.transformers.load import load
from moe_runtime.measure.random_read import RandomReads

_NO_EXPERTS = "moe_runtime_no_experts"
# A shared disk grants bursts: what reads first after a pause is served faster. So every contestant
# of the disk starts after the same pause, and raw reads last about as long as a round of tokens.
_PAUSE_SECONDS = 0.5
_RATE_SECONDS = 0.8
_RATE_SETTINGS = ((2**20, 2), (2**20, 8), (5 * 2**20, 2))

Round = list[int]
ROUTINGS = ("uniform", "own")


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Median and quartiles of what was measured."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        low, median, high = statistics.quantiles(values, n=4)
        return cls(median=median, low=low, high=high)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidentResult:
    """All experts in memory: milliseconds a token, and ratios within a round."""

    ours_ms: Spread
    eager_ms: Spread
    grouped_mm_ms: Spread
    no_experts_ms: Spread
    speedup_over_best: Spread
    is_bit_equal_to_eager: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadedResult:
    """Part of the experts in memory.

    `ceiling_ms` is what the disk and the dense layers alone would take: bytes missed over the best
    direct-read rate of this run, plus the step with experts as a no-op.
    """

    residency: float
    num_slots: int
    ours_ms: Spread
    ceiling_ms: Spread
    ratio_to_ceiling: Spread
    hit_rate: float
    bytes_missed_per_token: float
    read_over_missed: float
    best_direct_read_gbps: float
    is_bit_equal_to_eager: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeReport:
    """What ran where, and the results."""

    machine: dict[str, Any]
    model: dict[str, Any]
    resident: ResidentResult
    offloaded: list[OffloadedResult]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)


def benchmark_decode(
    folder: Path,
    *,
    residency: list[float],
    num_rounds: int = 12,
    tokens_per_round: int = 20,
    routing: str = "uniform",
    dtype: torch.dtype = torch.bfloat16,
    on_progress: Callable[[str], None] = lambda text: None,
) -> DecodeReport:
    """Teacher-forced random tokens, one at a time; contestants take turns, round by round.

    Tokens are forced because a random model's greedy decoding falls into a loop whose experts all
    stay cached. Its own router has favourites too, so by default each token's experts are drawn
    uniformly, the same ones for every contestant. The first third of the rounds warms up. Every
    result carries its gate: logits equal those of eager transformers in every bit.
    """
    if routing not in ROUTINGS:
        raise ValueError(f"routing {routing!r} is unknown; choose from {', '.join(ROUTINGS)}")
    on_progress("loading unmodified transformers")
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, experts_implementation="eager"
    )
    generator = torch.Generator().manual_seed(0)
    rounds: list[Round] = torch.randint(
        model.config.vocab_size, (num_rounds, tokens_per_round), generator=generator
    ).tolist()
    if routing == "uniform":
        draw_experts(model)
    expected = _forced_logits(model, rounds[0])
    ALL_EXPERTS_FUNCTIONS.register(_NO_EXPERTS, _no_experts)

    def load_ours(share: float) -> PreTrainedModel:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few slots are the point
            ours = load(folder, expert_memory=share, dtype=dtype)
        if routing == "uniform":
            draw_experts(ours)
        return ours

    resident = _resident(load_ours, model, rounds, expected, on_progress)
    with RandomReads(sorted(folder.glob("*.safetensors"))) as reads:
        offloaded = [
            _offloaded(reads, load_ours, model, rounds, expected, share, on_progress)
            for share in residency
        ]
    return DecodeReport(
        machine=_machine(),
        model={
            "name": folder.name,
            "dtype": str(dtype).removeprefix("torch."),
            "layers": model.config.num_hidden_layers,
            "parameters": model.num_parameters(),
            "routing": routing,
            "rounds": num_rounds,
            "tokens_per_round": tokens_per_round,
        },
        resident=resident,
        offloaded=offloaded,
    )


def draw_experts(model: PreTrainedModel) -> None:
    """From here on each token uses experts drawn uniformly, whatever the router of `model` says.

    The draw depends on layer and position in the sequence of calls since, so models that make the
    same calls draw the same experts.
    """

    def draw(layer: int, num_experts: int) -> Callable[..., tuple[torch.Tensor, ...]]:
        generator = torch.Generator().manual_seed(layer)

        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> Any:
            hidden, index, *rest = inputs
            noise = torch.rand(index.shape[0], num_experts, generator=generator)
            return hidden, noise.topk(index.shape[1]).indices, *rest

        return hook

    for layer, module in enumerate(experts_modules(model)):
        num_experts = int(module.num_experts)  # type: ignore[arg-type]
        module.register_forward_pre_hook(draw(layer, num_experts))


def experts_modules(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Fused experts modules in layer order, offloaded or not."""
    return [m for m in model.modules() if hasattr(m, "is_transposed") and hasattr(m, "has_gate")]


def _resident(
    load_ours: Callable[[float], PreTrainedModel],
    model: PreTrainedModel,
    rounds: list[Round],
    expected: torch.Tensor,
    on_progress: Callable[[str], None],
) -> ResidentResult:
    ours = load_ours(1.0)
    is_equal = torch.equal(_forced_logits(ours, rounds[0]), expected)
    times: dict[str, list[float]] = {"ours": [], "eager": [], "grouped_mm": [], _NO_EXPERTS: []}
    for index, tokens in enumerate(rounds):
        on_progress(f"resident, round {index + 1} of {len(rounds)}")
        for name, values in times.items():
            if name == "ours":
                values.append(_median_ms(ours, tokens))
            else:
                model.set_experts_implementation(name)
                values.append(_median_ms(model, tokens))
    handle(ours).close()
    counted = {name: values[len(rounds) // 3 :] for name, values in times.items()}
    ratios = [
        min(eager, grouped) / ours_ms
        for ours_ms, eager, grouped in zip(
            counted["ours"], counted["eager"], counted["grouped_mm"], strict=True
        )
    ]
    return ResidentResult(
        ours_ms=Spread.of(counted["ours"]),
        eager_ms=Spread.of(counted["eager"]),
        grouped_mm_ms=Spread.of(counted["grouped_mm"]),
        no_experts_ms=Spread.of(counted[_NO_EXPERTS]),
        speedup_over_best=Spread.of(ratios),
        is_bit_equal_to_eager=is_equal,
    )


def _offloaded(
    reads: RandomReads,
    load_ours: Callable[[float], PreTrainedModel],
    model: PreTrainedModel,
    rounds: list[Round],
    expected: torch.Tensor,
    share: float,
    on_progress: Callable[[str], None],
) -> OffloadedResult:
    ours = load_ours(share)
    is_equal = torch.equal(_forced_logits(ours, rounds[0]), expected)
    model.set_experts_implementation(_NO_EXPERTS)
    expert_bytes = handle(ours).budget.slot_bytes
    ours_ms, dense_ms, missed, hits, read = [], [], [], [], []
    rates: dict[tuple[int, int], list[float]] = {setting: [] for setting in _RATE_SETTINGS}
    for index, tokens in enumerate(rounds):
        on_progress(f"{share:.0%} resident, round {index + 1} of {len(rounds)}")
        before = handle(ours).report()["cache"]
        time.sleep(_PAUSE_SECONDS)
        ours_ms.append(_mean_ms(ours, tokens))
        after = handle(ours).report()["cache"]
        dense_ms.append(_mean_ms(model, tokens))
        missed.append((after["misses"] - before["misses"]) / len(tokens))
        hits.append((after["hits"] - before["hits"]) / len(tokens))
        read.append((after["bytes_read"] - before["bytes_read"]) / len(tokens))
        block_bytes, num_threads = _RATE_SETTINGS[index % len(_RATE_SETTINGS)]
        time.sleep(_PAUSE_SECONDS)
        rates[block_bytes, num_threads].append(
            reads.rate_gbps(block_bytes=block_bytes, num_threads=num_threads, seconds=_RATE_SECONDS)
        )
    num_slots = handle(ours).budget.num_slots
    handle(ours).close()
    del ours
    gc.collect()
    counted = slice(len(rounds) // 3, None)
    best_gbps = max(statistics.median(values) for values in rates.values() if values)
    ceiling = [
        misses * expert_bytes / best_gbps / 1e6 + dense
        for misses, dense in zip(missed[counted], dense_ms[counted], strict=True)
    ]
    ratios = [ms / limit for ms, limit in zip(ours_ms[counted], ceiling, strict=True)]
    num_missed, num_hits = sum(missed[counted]), sum(hits[counted])
    return OffloadedResult(
        residency=share,
        num_slots=num_slots,
        ours_ms=Spread.of(ours_ms[counted]),
        ceiling_ms=Spread.of(ceiling),
        ratio_to_ceiling=Spread.of(ratios),
        hit_rate=num_hits / (num_hits + num_missed),
        bytes_missed_per_token=statistics.mean(missed[counted]) * expert_bytes,
        read_over_missed=sum(read[counted]) / (num_missed * expert_bytes),
        best_direct_read_gbps=best_gbps,
        is_bit_equal_to_eager=is_equal,
    )


def _no_experts(
    module: torch.nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    return torch.zeros_like(hidden_states)


@torch.no_grad()
def _step_times_ms(model: PreTrainedModel, tokens: Round) -> list[float]:
    cache = DynamicCache(config=model.config)
    times = []
    for token in tokens:
        start = time.perf_counter()
        model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
        times.append((time.perf_counter() - start) * 1e3)
    return times


def _median_ms(model: PreTrainedModel, tokens: Round) -> float:
    return statistics.median(_step_times_ms(model, tokens))


def _mean_ms(model: PreTrainedModel, tokens: Round) -> float:
    # Misses differ from token to token, so bytes and times must both be means.
    return statistics.mean(_step_times_ms(model, tokens))


@torch.no_grad()
def _forced_logits(model: PreTrainedModel, tokens: Round) -> torch.Tensor:
    cache = DynamicCache(config=model.config)
    logits = [
        model(torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits
        for token in tokens
    ]
    return torch.cat(logits, dim=1)


def _machine() -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
