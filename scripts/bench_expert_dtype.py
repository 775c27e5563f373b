"""Measures what int8 and int4 experts cost in quality: bits per byte of held-out text.

    python scripts/bench_expert_dtype.py moe_runtime/demo/mixtral-stdlib --bytes 300000

The text is the demo's: modules of the standard library that scripts/train_demo_model.py kept back.
"""

import argparse
import warnings
from pathlib import Path

from train_demo_model import load_corpus
from transformers import AutoTokenizer

import moe_runtime
from moe_runtime.integrations.transformers.progress import quiet_transformers
from moe_runtime.kernels.quantise import QUANTISED_DTYPES
from moe_runtime.measure.bits_per_byte import bits_per_byte

CONTEXT_TOKENS = 1024  # the demo's


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--bytes", type=int, default=300_000, help="at least so much text")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    texts, num_bytes = [], 0
    for text in load_corpus(smoke=False).heldout.values():
        if num_bytes < arguments.bytes:
            texts.append(text)
            num_bytes += len(text.encode())
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    documents = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    print(f"{len(texts)} held-out modules, {num_bytes} bytes, {sum(map(len, documents))} tokens")
    for expert_dtype in ("auto", *QUANTISED_DTYPES):
        with quiet_transformers(lambda done, total: None):
            model = moe_runtime.load(
                arguments.model, expert_dtype=expert_dtype, expert_memory="100%"
            )
        found = bits_per_byte(
            model,
            documents,
            num_bytes=num_bytes,
            context_tokens=CONTEXT_TOKENS,
            end_token=tokenizer.eos_token_id,
        )
        cache = moe_runtime.handle(model).report()["cache"]
        name = "bfloat16" if expert_dtype == "auto" else expert_dtype
        print(
            f"{name}: {found:.4f} bits per byte, {cache['slot_bytes']} bytes an expert", flush=True
        )
        moe_runtime.handle(model).close()


if __name__ == "__main__":
    main()
