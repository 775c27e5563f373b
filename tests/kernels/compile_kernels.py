"""Compiles every Triton kernel for a GPU that is not there, and prints what each one takes.

Run as a process of its own, without TRITON_INTERPRET: `python compile_kernels.py 90`. The wrappers
run as they are, on CPU tensors; each launch ends after the compiler, so results are not looked at.
"""

import json
import sys
from dataclasses import replace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from moe_runtime.kernel_settings import KernelSettings, LayerSettings
from moe_runtime.kernels import combine as combine_file
from moe_runtime.kernels import dequant, grouped_gemm, permute, topk, unpack
from moe_runtime.kernels.gate import Gate
from moe_runtime.kernels.slot_weights import SlotWeights, WeightFormat
from tests.kernels.quantised import random_weights

T, K, E, S, D, F = 3, 2, 8, 4, 256, 128


class NoDriver:
    """What the compiler asks of a driver."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


class Compilation:
    """Catches launches; `report` names each compiled kernel by the call that led to it."""

    def __init__(self, capability: int) -> None:
        triton.runtime.driver.set_active(NoDriver(capability))
        for module in (combine_file, dequant, grouped_gemm, permute, topk, unpack):
            module.check_device = lambda *args, **tensors: None  # type: ignore[attr-defined]
        self.label = ""
        compile_and_launch = JITFunction.run

        def compile_only(kernel: Any, *args: Any, **options: Any) -> Any:
            compiled = compile_and_launch(kernel, *args, **{**options, "warmup": True})
            report = {
                "call": self.label,
                "kernel": kernel.__name__,
                "shared_bytes": compiled.metadata.shared,
                "instructions": sorted(
                    name for name in ("wgmma", "mma.sync") if name in compiled.asm["ptx"]
                ),
            }
            print(json.dumps(report), flush=True)
            return compiled

        JITFunction.run = compile_only

    def routers(self) -> None:
        logits_TE, bias_E = torch.zeros(T, E, dtype=torch.bfloat16), torch.zeros(E)
        self.label = "route softmax"
        topk.route(logits_TE, top_k=K, scoring="softmax", normalize=True)
        self.label = "route sigmoid, groups, bias"
        topk.route(
            logits_TE,
            top_k=K,
            scoring="sigmoid",
            bias_E=bias_E,
            num_groups=4,
            top_groups=2,
            group_score="best_two",
            normalize=True,
        )

    def ways(self) -> None:
        ids = torch.zeros(T, K, dtype=torch.int64)
        self.label = "sort_pairs"
        order = permute.sort_pairs(
            ids, num_experts=E, block_rows=16, slots_E=torch.zeros(E, dtype=torch.int32)
        )
        self.label = "combine"
        y_RD = torch.zeros(order.pairs_R.numel(), D, dtype=torch.bfloat16)
        combine_file.combine(y_RD, torch.zeros_like(order.rows_TK), torch.zeros(T, K))

    def dequantising(self, weight_format: WeightFormat) -> None:
        self.label = f"dequantize {weight_format}"
        dequant.dequantize(random_weights(weight_format, 1, 32, 128)[0], torch.bfloat16)

    def product(
        self, entry: LayerSettings, weight_format: WeightFormat, dtype: torch.dtype, gate: Gate
    ) -> None:
        """gate_up: down is the same kernel with less in it."""
        self.label = f"{weight_format} {dtype} {gate.activation}, {entry.block_rows} rows"
        B = 2
        order = permute.SortedPairs(
            pairs_R=torch.zeros(B * entry.block_rows, dtype=torch.int32),
            rows_TK=torch.zeros(T, K, dtype=torch.int32),
            block_experts_B=torch.zeros(B, dtype=torch.int32),
            counts_E=torch.zeros(E, dtype=torch.int32),
            block_rows=entry.block_rows,
        )
        grouped_gemm.gate_up(
            torch.zeros(T, D, dtype=dtype),
            replace(empty_weights(weight_format, 2 * F, D, dtype), bias=torch.zeros(S, 2 * F)),
            torch.zeros(E, dtype=torch.int32),
            order,
            gate=gate,
            settings=entry.gate_up,
        )


def empty_weights(weight_format: WeightFormat, N: int, K: int, dtype: torch.dtype) -> SlotWeights:
    def zeros(*shape: int, kind: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(S, *shape, dtype=kind)

    if weight_format == "plain":
        return SlotWeights(values=zeros(N, K, kind=dtype))
    values, scales, group = {
        "int8": (zeros(N, K, kind=torch.int8), zeros(N), 0),
        "fp8": (zeros(N, K, kind=torch.float8_e4m3fn), zeros(-(-N // 128), -(-K // 128)), 0),
        "int4": (zeros(N, K // 2, kind=torch.uint8), zeros(N, K // 64), 64),
        "mxfp4": (zeros(N, K // 2, kind=torch.uint8), zeros(N, K // 32, kind=torch.uint8), 0),
    }[weight_format]
    return SlotWeights(values=values, scales=scales, format=weight_format, group=group)


def main() -> None:
    capability = int(sys.argv[1])
    compilation = Compilation(capability)
    settings = KernelSettings.untuned()
    bf16 = [entry for entry in settings.entries if entry.value_bytes == 2]
    silu, clamped = Gate(), Gate(activation="clamped", is_interleaved=True)
    compilation.product(bf16[-1], "plain", torch.bfloat16, silu)
    if capability >= 89:
        compilation.product(bf16[-1], "fp8", torch.bfloat16, silu)
    if capability < 90:  # what differs between chips is the product: the rest is compiled once
        return
    for entry in settings.entries:
        dtype = torch.bfloat16 if entry.value_bytes == 2 else torch.float32
        if entry is not bf16[-1]:
            compilation.product(entry, "plain", dtype, silu)
    compilation.product(bf16[-1], "plain", torch.float16, clamped)
    four_bits: tuple[WeightFormat, ...] = ("int4", "mxfp4")
    for weight_format in ("int8", *four_bits):
        compilation.product(bf16[-1], weight_format, torch.bfloat16, silu)
    compilation.product(bf16[0], "mxfp4", torch.bfloat16, clamped)
    formats: tuple[WeightFormat, ...] = ("int8", "fp8", *four_bits)
    for weight_format in formats:
        compilation.dequantising(weight_format)
    compilation.routers()
    compilation.ways()
    compilation.label = "unpack"
    unpack.unpack(torch.zeros(1, 2**20, dtype=torch.uint8), 64, 1024, 64)


if __name__ == "__main__":
    main()
