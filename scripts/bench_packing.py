"""Measures what packed experts bring: rates of the codec, and decoding beside the plain model.

    moe-runtime pack MODEL -o PACKED
    python scripts/bench_packing.py MODEL PACKED --expert-memory 35% --routing uniform

The three ways (plain; packed on disk; packed in slots too) take turns token by token on the same
forced tokens and routing, with the same expert memory, and their logits must be equal in every bit.
"""

import argparse
import statistics
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import moe_runtime
from moe_runtime.integrations.transformers.progress import quiet_transformers
from moe_runtime.kernels.cpu.unpack import load_codec
from moe_runtime.kernels.cpu.unpack_status import unpack_status
from moe_runtime.kernels.packed_blocks import INTACT, PADDING_BYTES, BlockTask
from moe_runtime.measure.bench.routing import read_routings
from moe_runtime.measure.replay_routing import experts_modules, replay_routing

WARM_UP_SHARE = 1 / 3
N, K = 160, 2048  # a block of 0.5 MB
CODEC_BYTES = 200_000_000  # beyond the caches
REPEATS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("packed", type=Path)
    parser.add_argument("--expert-memory", default="35%")
    parser.add_argument("--routing", default="forced", help="forced, uniform or trace:FILE")
    parser.add_argument("--tokens", type=int, default=90)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    measure_codec()
    measure_decoding(arguments)


def measure_codec() -> None:
    """One core, normal weights, blocks and weights in memory; the best of some runs."""
    codec = load_codec()
    weights = (torch.randn(N, K, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    block = codec.pack(weights)
    padded = torch.zeros(-(-block.numel() // PADDING_BYTES) * PADDING_BYTES, dtype=torch.uint8)
    padded[: block.numel()] = block
    codec.seal(padded, 0)
    blocks = padded.repeat(CODEC_BYTES // weights.nbytes, 1)
    target = torch.zeros(len(blocks), N, K, dtype=torch.bfloat16)
    tasks = [
        BlockTask(block=b, N=N, K=K, identity=0, weights=t)
        for b, t in zip(blocks, target, strict=True)
    ]
    share = padded.numel() / weights.nbytes
    print(f"codec: {unpack_status()}, one core, {share:.4f} of the bytes of normal weights")
    for what, options in [
        ("checked and unpacked past the caches", {"stream": True}),
        ("unpacked through the caches, unchecked", {"is_known": True}),
    ]:
        seconds = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            assert set(codec.run(tasks, **options)) == {INTACT}
            seconds.append(time.perf_counter() - started)
        print(f"  {what}: {target.nbytes / min(seconds) / 1e9:.1f} GB/s of bf16")
    started = time.perf_counter()
    for _ in range(REPEATS):
        codec.pack(weights)
    rate = REPEATS * weights.nbytes / (time.perf_counter() - started) / 1e9
    print(f"  packed: {rate:.2f} GB/s of bf16")


def measure_decoding(arguments: argparse.Namespace) -> None:
    ways = {
        "plain": (arguments.model, "auto"),
        "packed on disk": (arguments.packed, "unpacked"),
        "packed in slots": (arguments.packed, "packed"),
    }
    with quiet_transformers(lambda done, total: None):
        models = {
            name: moe_runtime.load(
                folder, expert_memory=arguments.expert_memory, expert_slots=slots
            )
            for name, (folder, slots) in ways.items()
        }
    warm_up = int(arguments.tokens * WARM_UP_SHARE)
    seconds, before = decode(models, arguments, warm_up)
    print(f"{arguments.routing}, {arguments.expert_memory} of expert bytes, equal logits:")
    for name, model in models.items():
        cache, first = cache_of(model), before[name]
        hits, misses = (cache[what] - first[what] for what in ("hits", "misses"))
        read = (cache["bytes_read"] - first["bytes_read"]) / (arguments.tokens - warm_up)
        low, median, high = (1e3 * q for q in statistics.quantiles(seconds[name][warm_up:], n=4))
        print(
            f"  {name}: {median:.1f} ms a token (quartiles {low:.1f}, {high:.1f}), "
            f"{cache['slots']} slots, {hits / (hits + misses):.1%} hits, {read / 1e6:.0f} MB read"
        )


@torch.no_grad()
def decode(
    models: dict[str, PreTrainedModel], arguments: argparse.Namespace, warm_up: int
) -> tuple[dict[str, list[float]], dict[str, dict[str, Any]]]:
    """Seconds of each token, and the caches' counts after the warm-up, by way."""
    any_model = models["plain"]
    modules = experts_modules(any_model)
    (routing,) = read_routings(arguments.routing)
    trace = routing.rows(
        num_rows=arguments.tokens,
        num_layers=len(modules),
        num_experts=int(modules[0].num_experts),
        top_k=moe_runtime.handle(any_model).sites[0].top_k,
    )
    generator = torch.Generator().manual_seed(0)
    vocab_size = any_model.config.get_text_config().vocab_size
    tokens = torch.randint(vocab_size, (arguments.tokens,), generator=generator)
    keys: dict[str, Any] = dict.fromkeys(models)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    before: dict[str, dict[str, Any]] = {}
    with ExitStack() as replays:
        for model in models.values():
            if trace is not None:
                replays.enter_context(replay_routing(model, trace))
        for step, token in enumerate(tokens):
            if step == warm_up:
                before = {name: cache_of(model) for name, model in models.items()}
            logits = []
            for name, model in models.items():
                started = time.perf_counter()
                output = model(token.view(1, 1), past_key_values=keys[name], use_cache=True)
                seconds[name].append(time.perf_counter() - started)
                keys[name] = output.past_key_values
                logits.append(output.logits)
            assert all(torch.equal(one, logits[0]) for one in logits), "no speed without parity"
    return seconds, before


def cache_of(model: PreTrainedModel) -> dict[str, Any]:
    return dict(moe_runtime.handle(model).report()["cache"])


if __name__ == "__main__":
    main()
