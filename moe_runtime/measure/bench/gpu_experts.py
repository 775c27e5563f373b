"""Grouped products on a GPU: decode as a share of its memory's rate, prompts beside torch's."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import grouped_mm_experts_forward

from moe_runtime.errors import ProbeError
from moe_runtime.integrations.transformers.experts import reference_forward
from moe_runtime.integrations.transformers.proof import expert_math
from moe_runtime.integrations.transformers.tiered_maths import find_grouped
from moe_runtime.layer import Accumulator
from moe_runtime.measure.bench.presets import Preset
from moe_runtime.measure.fast_parity import MAX_RATIO
from moe_runtime.measure.probe.gpu_rate import GpuDevice, GpuMemoryRate
from moe_runtime.measure.probe.memory_rate import sound_noise
from moe_runtime.measure.spread import Spread
from moe_runtime.tiered_math import GroupedKernel

_DTYPE = torch.bfloat16
_TOKENS = (1, 2, 4, 8, 16, 32, 64)
# Recorded together, each with a routing of its own: what one call leaves in the GPU's cache is a
# small part of what all of them read.
_NUM_CALLS = 8
_READ_BYTES = 2 * 2**30
_NOISE_BYTES = 2**21
_NOISE_LENGTH = 1_000_003  # a prime: no two experts, rows or columns are alike
_WEIGHT_SIZE = 0.02
_GATE_TOKENS = 8

# (hidden `[T, D]`, experts `[T, K]` int64, scores `[T, K]` float32)
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeShare:
    """Layers of `tokens` tokens each; `share` is of reads of GPU memory that took turns with them.

    `layer_bytes` are those of the weights that a layer uses, on average.
    """

    tokens: int
    layer_bytes: float
    share: Spread
    gbps: Spread
    read_gbps: Spread


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuExpertsReport:
    """One layer's experts on one GPU. `errors` are relative norms against float32."""

    gpu: str
    shape: str
    experts: str  # what computed them
    errors: dict[str, float]
    decode: list[DecodeShare]
    prefill_tokens: int
    prefill_ms: dict[str, Spread]
    prefill_speedup: Spread

    @property
    def is_green(self) -> bool:
        """Whether our experts are as near to float32 as transformers' eager ones."""
        return self.errors["moe_runtime"] <= MAX_RATIO * self.errors["eager"]


def measure_gpu_experts(
    preset: Preset,
    gpu: GpuDevice,
    *,
    rounds: int,
    prefill_tokens: int,
    on_round: Callable[[int, int], None],
) -> GpuExpertsReport:
    """Reads, steps of 1 to 64 tokens and prompts take turns on one layer of experts.

    Steps are recorded once and replayed, so no launch of the host is in their time.
    """
    bench = _Layer(preset, gpu)
    memory = GpuMemoryRate(gpu, min(_READ_BYTES, gpu.free_bytes // 4))
    steps = [bench.steps(tokens) for tokens in _TOKENS]
    prompt = bench.inputs(prefill_tokens)
    contestants = {"grouped_mm": bench.grouped_mm, "moe_runtime": bench.ours}
    gbps: list[list[float]] = [[] for _ in steps]
    reads: list[list[float]] = [[] for _ in steps]
    prefill: dict[str, list[float]] = {name: [] for name in contestants}
    with torch.inference_mode():
        errors = bench.errors()
        for done in range(rounds + 1):  # the first warms up
            for n, (run, num_bytes) in enumerate(steps):
                read = memory.read_gbps()
                rate = num_bytes / _seconds(run, gpu) / 1e9
                if done:
                    reads[n].append(read)
                    gbps[n].append(rate)
            for name, contestant in contestants.items():
                seconds = _seconds(lambda run=contestant: run(prompt), gpu)  # type: ignore[misc]
                if done:
                    prefill[name].append(seconds * 1e3)
            on_round(done, rounds)
    return GpuExpertsReport(
        gpu=gpu.name,
        shape=preset.name,
        experts=bench.kernel.path,
        errors=errors,
        decode=[
            DecodeShare(
                tokens=tokens,
                layer_bytes=num_bytes / _NUM_CALLS,
                share=Spread.of([a / b for a, b in zip(gbps[n], reads[n], strict=True)]),
                gbps=Spread.of(gbps[n]),
                read_gbps=Spread.of(reads[n]),
            )
            for n, (tokens, (_, num_bytes)) in enumerate(zip(_TOKENS, steps, strict=True))
        ],
        prefill_tokens=prefill_tokens,
        prefill_ms={name: Spread.of(values) for name, values in prefill.items()},
        prefill_speedup=Spread.of(
            [a / b for a, b in zip(prefill["grouped_mm"], prefill["moe_runtime"], strict=True)]
        ),
    )


class _Layer:
    """One experts module with random weights, and the ways to compute it."""

    def __init__(self, preset: Preset, gpu: GpuDevice) -> None:
        self._gpu = gpu
        self._top_k = preset.top_k
        self._module: Any = random_experts(preset, gpu.device)
        self._parameters = {n: p.detach() for n, p in self._module.named_parameters(recurse=False)}
        self._num_experts, self._dim = self._parameters["down_proj"].shape[:2]
        self._slots_E = torch.arange(self._num_experts, dtype=torch.int32, device=gpu.device)
        self._expert_bytes = sum(p[0].nbytes for p in self._parameters.values())
        self._generator = torch.Generator().manual_seed(0)
        math = expert_math(self._module, Accumulator.FLOAT32)
        assert math is not None
        kernel = find_grouped(self._module, math, _DTYPE, gpu.device)
        if isinstance(kernel, str):
            raise ProbeError(f"Triton computes no experts of {preset.name} on {gpu.name}: {kernel}")
        self.kernel: GroupedKernel = kernel

    def inputs(self, num_tokens: int) -> Inputs:
        """Random tokens, each with its own random experts."""
        noise_TE = torch.rand(num_tokens, self._num_experts, generator=self._generator)
        index_TK = noise_TE.argsort(-1)[:, : self._top_k]
        hidden_TD = torch.randn(num_tokens, self._dim, generator=self._generator).to(_DTYPE)
        scores_TK = torch.rand(num_tokens, self._top_k, generator=self._generator)
        device = self._gpu.device
        return hidden_TD.to(device), index_TK.to(device), scores_TK.to(device)

    def ours(self, inputs: Inputs) -> torch.Tensor:
        return self.kernel.run(*inputs, self._parameters, self._slots_E)[0]

    def grouped_mm(self, inputs: Inputs) -> torch.Tensor:
        output: torch.Tensor = grouped_mm_experts_forward(self._module, *inputs)
        return output

    def steps(self, num_tokens: int) -> tuple[Callable[[], object], int]:
        """Several layers in one recording, and the bytes of weights that they must read."""
        calls = [self.inputs(num_tokens) for _ in range(_NUM_CALLS)]
        num_experts = sum(len(set(index_TK.flatten().tolist())) for _, index_TK, _ in calls)

        def run() -> None:
            for inputs in calls:
                self.ours(inputs)

        return _recorded(run, self._gpu.device), num_experts * self._expert_bytes

    def errors(self) -> dict[str, float]:
        """Against the same layer in float32, on the same inputs."""
        inputs = self.inputs(_GATE_TOKENS)
        wide: Any = copy.deepcopy(self._module).float()
        reference = reference_forward(type(self._module))
        expected = reference(wide, inputs[0].float(), *inputs[1:])
        found = {
            "eager": reference(self._module, *inputs),
            "grouped_mm": self.grouped_mm(inputs),
            "moe_runtime": self.ours(inputs),
        }
        return {
            name: float((output.float() - expected).norm() / expected.norm())
            for name, output in found.items()
        }


def random_experts(preset: Preset, device: torch.device) -> nn.Module:
    """The experts of one layer of `preset` with random weights that cost little."""
    num_dense = int(preset.fields.get("first_k_dense_replace", 0))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            preset.changed(num_layers=num_dense + 1).config(), dtype=_DTYPE
        )
    module: nn.Module = next(m for m in model.modules() if hasattr(m, "is_concatenated"))
    try:
        module.to_empty(device=device)
    except torch.OutOfMemoryError as error:
        raise ProbeError(
            f"one layer of {preset.name}'s experts does not fit on {device}: {error}; end other "
            "programs there, or choose smaller shapes"
        ) from error
    noise = sound_noise(_NOISE_BYTES).view(torch.bfloat16)[:_NOISE_LENGTH].to(device) * _WEIGHT_SIZE
    for number, parameter in enumerate(module.parameters()):
        start, flat = noise.roll(number * 9973), parameter.data.view(-1)  # no two alike
        for begin in range(0, flat.numel(), len(start)):
            part = flat[begin : begin + len(start)]
            part.copy_(start[: len(part)])
    return module.eval().requires_grad_(False)


def _recorded(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """`run` as a CUDA graph, or itself where there are none."""
    if device.type != "cuda":
        return run
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream(device))  # sync: of streams
    with torch.cuda.stream(side):
        run()  # compiles
    torch.cuda.current_stream(device).wait_stream(side)  # sync: of streams
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _seconds(run: Callable[[], object], gpu: GpuDevice) -> float:
    gpu.synchronize()  # sync: what was started before is not of this measurement
    start = time.perf_counter()
    run()
    gpu.synchronize()  # sync: the clock must not stop before the work does
    return time.perf_counter() - start
