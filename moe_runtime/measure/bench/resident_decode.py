"""Decode and prefill of a model in memory with several experts implementations in turns."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_runtime.integrations.transformers.experts import reference_forward
from moe_runtime.integrations.transformers.linears import slow_down_linears, speed_up_linears
from moe_runtime.integrations.transformers.register import NAME, experts_path, register
from moe_runtime.measure.bench.presets import Preset
from moe_runtime.measure.fast_parity import MAX_RATIO
from moe_runtime.measure.probe.memory_rate import sound_noise
from moe_runtime.measure.spread import Spread

_NO_EXPERTS = "no_experts"
_LINEARS = f"{NAME}, linears"
_PEERS = ("eager", "grouped_mm")
_VARIANTS = (*_PEERS, NAME, _LINEARS, _NO_EXPERTS)
_PREFILL_VARIANTS = ("grouped_mm", NAME)
_NOISE_BYTES = 2**21
_NOISE_LENGTH = 1_000_003  # a prime: no two experts, rows or columns are alike
_WEIGHT_SIZE = 0.02  # of random weights
_GATE_TOKENS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidentReport:
    """Milliseconds a token by variant, and of a prompt, with what they are compared to."""

    shape: str
    num_layers: int
    experts: str  # what computed them
    tokens_per_round: int
    prefill_tokens: int
    errors: dict[str, float]  # of one layer's experts against float32, relative norms
    decode_ms: dict[str, Spread]
    prefill_ms: dict[str, Spread]
    speedup: dict[str, Spread]  # of ours over the better peer of the same round
    prefill_speedup: Spread

    @property
    def is_green(self) -> bool:
        """Whether our experts are as near to float32 as transformers' eager ones."""
        return self.errors[NAME] <= MAX_RATIO * self.errors["eager"]


def measure_resident(
    preset: Preset,
    *,
    rounds: int,
    tokens_per_round: int,
    prefill_tokens: int,
    on_round: Callable[[int, int], None],
) -> ResidentReport:
    """All variants take turns on one model in memory, with the same forced tokens each round.

    `no_experts` leaves the experts out and nothing else: what is left of a token then.
    """
    register()
    ALL_EXPERTS_FUNCTIONS.register(_NO_EXPERTS, _no_experts)
    model = random_model(preset)
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(model.config.vocab_size)
    prompt = torch.randint(vocabulary, (1, prefill_tokens), generator=generator)
    decode: dict[str, list[float]] = {name: [] for name in _VARIANTS}
    prefill: dict[str, list[float]] = {name: [] for name in _PREFILL_VARIANTS}
    with torch.inference_mode():
        errors = _layer_errors(model, preset.top_k)
        for done in range(rounds + 1):  # the first warms up
            tokens = torch.randint(vocabulary, (1, tokens_per_round), generator=generator)
            for name in _VARIANTS:
                seconds = _decode(model, name, tokens)
                if done:
                    decode[name].append(seconds / tokens_per_round * 1e3)
            for name in _PREFILL_VARIANTS:
                seconds = _prefill(model, name, prompt)
                if done:
                    prefill[name].append(seconds * 1e3)
            on_round(done, rounds)
        _use(model, NAME)
        path = experts_path(model)
    return ResidentReport(
        shape=preset.name,
        num_layers=preset.num_layers,
        experts=path,
        tokens_per_round=tokens_per_round,
        prefill_tokens=prefill_tokens,
        errors=errors,
        decode_ms={name: Spread.of(values) for name, values in decode.items()},
        prefill_ms={name: Spread.of(values) for name, values in prefill.items()},
        speedup={
            name: Spread.of(
                [
                    min(peers) / ours
                    for *peers, ours in zip(
                        *(decode[peer] for peer in _PEERS), decode[name], strict=True
                    )
                ]
            )
            for name in (NAME, _LINEARS)
        },
        prefill_speedup=Spread.of(
            [a / b for a, b in zip(prefill["grouped_mm"], prefill[NAME], strict=True)]
        ),
    )


def random_model(preset: Preset) -> PreTrainedModel:
    """`preset` in bfloat16 with random weights that cost little to make."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            preset.config(), dtype=torch.bfloat16
        )
    model.to_empty(device="cpu")
    for module in model.modules():  # rotary frequencies, which no checkpoint holds
        has_buffers = any(True for _ in module.buffers(recurse=False))
        if has_buffers and not any(True for _ in module.parameters()):
            module.__init__(model.config)  # type: ignore[misc]
    noise = sound_noise(_NOISE_BYTES).view(torch.bfloat16)[:_NOISE_LENGTH] * _WEIGHT_SIZE
    for number, parameter in enumerate(model.parameters()):
        flat = parameter.data.view(-1)
        if parameter.dim() == 1:
            flat.fill_(1.0)
            continue
        start = noise.roll(number * 9973)  # no two parameters alike
        for begin in range(0, flat.numel(), len(start)):
            part = flat[begin : begin + len(start)]
            part.copy_(start[: len(part)])
    model.eval()
    return model


def _use(model: PreTrainedModel, variant: str) -> None:
    implementation = NAME if variant == _LINEARS else variant
    if model.config._experts_implementation != implementation:
        model.set_experts_implementation(implementation)
    slow_down_linears(model)
    if variant == _LINEARS:
        speed_up_linears(model)


def _layer_errors(model: PreTrainedModel, top_k: int) -> dict[str, float]:
    """The first layer's experts on random tokens, by each variant, against float32.

    One layer and given routing: further on, a random model's nearly tied experts let any rounding
    grow, and errors would say nothing of the code.
    """
    module: Any = next(m for m in model.modules() if hasattr(m, "is_concatenated"))
    wide: Any = copy.deepcopy(module).float()
    generator = torch.Generator().manual_seed(0)
    num_experts, dim = module.down_proj.shape[:2]
    hidden = torch.randn(_GATE_TOKENS, dim, generator=generator).bfloat16()
    index = torch.rand(_GATE_TOKENS, num_experts, generator=generator).argsort(-1)[:, :top_k]
    scores = torch.rand(_GATE_TOKENS, top_k, generator=generator)
    expected = reference_forward(type(module))(wide, hidden.float(), index, scores)
    errors = {}
    for name in (*_PEERS, NAME):
        _use(model, name)
        found = module(hidden, index, scores).float()
        errors[name] = float((found - expected).norm() / expected.norm())
    return errors


def _decode(model: PreTrainedModel, variant: str, tokens: torch.Tensor) -> float:
    """Seconds of all tokens, without those of the switch."""
    _use(model, variant)
    cache = DynamicCache(config=model.config)
    start = time.perf_counter()
    for token in tokens.unbind(1):
        model(token[:, None], past_key_values=cache, use_cache=True)
    return time.perf_counter() - start


def _prefill(model: PreTrainedModel, variant: str, prompt: torch.Tensor) -> float:
    _use(model, variant)
    start = time.perf_counter()
    model(prompt, use_cache=False, logits_to_keep=1)
    return time.perf_counter() - start


def _no_experts(
    module: torch.nn.Module, hidden_TD: torch.Tensor, index: torch.Tensor, scores: torch.Tensor
) -> torch.Tensor:
    return torch.zeros_like(hidden_TD)
