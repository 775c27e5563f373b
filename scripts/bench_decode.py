"""Measures decode speed: offloaded experts against transformers in memory and against the disk.

Without --model it makes a random Mixtral first (8 layers x 32 experts, 1.4 GB, in --work-folder).
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from moe_runtime.measure.decode_benchmark import ROUTINGS, DecodeReport, benchmark_decode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="folder of a transformers checkpoint")
    parser.add_argument("--work-folder", type=Path, default=Path("build"), help="for the model")
    parser.add_argument("--residency", default="65,35", help="percent of expert bytes, by commas")
    parser.add_argument("--rounds", type=int, default=18, help="a third of them warms up")
    parser.add_argument("--tokens", type=int, default=20, help="per round")
    parser.add_argument("--routing", choices=ROUTINGS, default="uniform", help="whose experts")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    folder = arguments.model or random_mixtral(arguments.work_folder / "random-mixtral-8x32")
    report = benchmark_decode(
        folder,
        residency=[float(percent) / 100 for percent in arguments.residency.split(",")],
        num_rounds=arguments.rounds,
        tokens_per_round=arguments.tokens,
        routing=arguments.routing,
        on_progress=lambda text: print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True),
    )
    print("\r\033[K", end="", file=sys.stderr)
    print(report.to_json() if arguments.json else as_text(report))


def random_mixtral(folder: Path) -> Path:
    """8 layers x 32 experts, top-2, hidden 512, ffn 1792, bfloat16, unless it is there already."""
    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        config = MixtralConfig(
            vocab_size=2000,
            hidden_size=512,
            intermediate_size=1792,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            num_local_experts=32,
            num_experts_per_tok=2,
            max_position_embeddings=2048,
        )
        MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def as_text(report: DecodeReport) -> str:
    """The report for people."""
    resident = report.resident
    lines = [
        f"model    {report.model}",
        f"machine  {report.machine}",
        "",
        "all experts resident, ms per token: median (quartiles)",
        f"  transformers eager       {resident.eager_ms}",
        f"  transformers grouped_mm  {resident.grouped_mm_ms}",
        f"  moe_runtime              {resident.ours_ms}",
        f"  experts as a no-op       {resident.no_experts_ms}",
        f"  speed-up over the better of eager and grouped_mm  {resident.speedup_over_best}",
        f"  logits equal eager's bit for bit  {resident.is_bit_equal_to_eager}",
    ]
    for result in report.offloaded:
        lines += [
            "",
            f"{result.residency:.0%} of expert bytes ({result.num_slots} slots), ms per token",
            f"  moe_runtime        {result.ours_ms}",
            f"  ceiling            {result.ceiling_ms}",
            f"  ratio to ceiling   {result.ratio_to_ceiling}",
            f"  hit rate {result.hit_rate:.3f}, "
            f"missed {result.bytes_missed_per_token / 1e6:.1f} MB per token, "
            f"bytes read / missed {result.read_over_missed:.4f}",
            f"  best direct-read rate {result.best_direct_read_gbps:.3f} GB/s",
            f"  logits equal eager's bit for bit  {result.is_bit_equal_to_eager}",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
