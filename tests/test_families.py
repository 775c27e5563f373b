"""Every family of transformers computes the same bits with 30 % of its experts in memory."""

import os
import subprocess
import sys
import warnings
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import moe_runtime
from moe_runtime.memory.checkpoint import Checkpoint
from tests.reference_families import DTYPES
from tests.tiny_models import (
    experts_modules,
    families,
    family_classes,
    greedy_ids,
    logits_of,
    prompt,
)

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "families.md"
EXPERT_MEMORY = "30%"
FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with each family's checkpoint and what unmodified transformers makes of it.

    That process computes with one thread, as this one does (conftest.py): the number of threads
    changes the order of sums.
    """
    folder = tmp_path_factory.mktemp("families")
    command = [sys.executable, "-m", "tests.reference_families", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=600)
    return folder


def load(folder: Path, dtype: str) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*expert slots are fewer.*")
        return moe_runtime.load(
            folder, expert_memory=EXPERT_MEMORY, exact=True, dtype=DTYPES[dtype]
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", families())
def test_offloaded_equals_unmodified_bit_for_bit(reference: Path, family: str, dtype: str) -> None:
    """Logits and greedy tokens equal eager's in every bit, while most experts are on disk."""
    expected = torch.load(reference / f"{family}.pt")
    if expected["reason"] is not None:
        pytest.skip(f"unmodified transformers cannot reload {family}: {expected['reason']}")
    model = load(reference / family, dtype)
    with moe_runtime.handle(model) as handle:
        assert torch.equal(logits_of(model, prompt()), expected["outputs"][dtype]["logits"])
        assert torch.equal(greedy_ids(model, prompt()), expected["outputs"][dtype]["ids"])
        cache = handle.report()["cache"]
    assert cache["misses"] > cache["slots"], "the test must read experts more than once"
    assert cache["slots"] * cache["slot_bytes"] <= 0.3 * handle.budget.expert_total_bytes


def test_the_document_says_what_the_tests_prove(reference: Path) -> None:
    """docs/families.md lists every family, its layout and how its experts are computed."""
    text = document(reference)
    if os.environ.get("MOE_RUNTIME_WRITE_DOCS"):
        DOCUMENT.write_text(text)
    assert DOCUMENT.read_text() == text, (
        "docs/families.md is out of date: run MOE_RUNTIME_WRITE_DOCS=1 scripts/test "
        "tests/test_families.py"
    )


QUANTISED = (
    "## Quantised checkpoints",
    "",
    "fp8 as DeepSeek-V3 ships it (e4m3, a scale for each square of 128 x 128) and mxfp4 as",
    "gpt-oss ships it load as they are, on the CPU. Experts keep their stored bytes in files and",
    "memory. In bfloat16 a kernel computes from these; with `exact=True`, in other dtypes and for",
    "many tokens one at a time is dequantised into memory that is used again. Other fp8 weights",
    "(attention, shared experts, dense layers) become the model's dtype while loading. Other",
    "methods, and other settings of these, are refused by name.",
    "",
    "`tests/integrations/test_quantised.py` compares tiny deepseek_v3 and qwen3_moe (fp8) and",
    "gpt_oss (mxfp4) with the model that transformers itself dequantises, in bfloat16 and float32,",
    "35 % of the experts in memory: with `exact=True` equal in every bit. Where a side of an fp8",
    "weight is more than 128 and no multiple of it (576 rows in DeepSeek-V3's kv_a_proj_with_mqa)",
    "transformers 5.23 fails, or takes the squares to be smaller than they are: the reference",
    "there is a model dequantised square by square, as `generate --check` reads such weights.",
)


def document(reference: Path) -> str:
    """docs/families.md for the installed transformers."""
    rows = [row(reference, family) for family in families()]
    return "\n".join(
        [
            "# Families",
            "",
            f"The {len(rows)} causal-LM families of transformers "
            f"{transformers.__version__} whose experts modules carry",
            "`use_experts_implementation`. For each, `tests/test_families.py` builds a tiny random",
            f"model, loads it with {EXPERT_MEMORY} of its expert bytes, and compares logits and "
            "greedy tokens with the",
            "unmodified model (eager experts, its own process) in float32 and bfloat16: equal in",
            "every bit. A family without a remark is no exception.",
            "",
            "*Experts* names the code that computes them: `torch` is the project's loop, proven",
            "equal to the family's own forward when the model loads; `torch, family's forward` is",
            "that forward itself, fed from slots.",
            "",
            "| family | model | flags | one expert's tensors in a checkpoint | experts | remark |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            *QUANTISED,
            "",
        ]
    )


def row(reference: Path, family: str) -> str:
    reason = torch.load(reference / f"{family}.pt")["reason"]
    if reason is not None:
        return f"| {family} | {family_classes()[family]} | | | | left out: {reason} |"
    checkpoint = Checkpoint.open(reference / family)
    model = load(reference / family, "float32")
    with moe_runtime.handle(model) as handle:
        module = next(iter(experts_modules(model).values()))
        flags = ", ".join(flag for flag in FLAGS if getattr(module, flag))
        plan = handle.engine.tensor_map
        sources = {
            box.source.name
            for assembly in plan.layers[0].parameters.values()
            for box in assembly.select(0, 0).boxes
        }
        experts = handle.report()["settings"]["experts"]
    assert sources <= set(checkpoint)
    paths = [name.split(".") for name in sources]
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    prefix = ".".join(parts[0] for parts in shared)
    names = ", ".join(f"`{name.removeprefix(prefix + '.')}`" for name in sorted(sources))
    return f"| {family} | {type(model).__name__} | {flags} | `{prefix}`: {names} | {experts} | |"
