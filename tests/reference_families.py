"""Unmodified transformers, in a process of its own: saves each tiny model and what it computes.

Usage: python -m tests.reference_families FOLDER. Imports nothing of moe_runtime.
"""

import sys
from pathlib import Path

import torch
import transformers

from tests.tiny_models import (
    can_reload,
    families,
    greedy_ids,
    load_unmodified,
    logits_of,
    prompt,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for family in families():
        reason = can_reload(family, folder / family)
        outputs = {} if reason else {name: outputs_of(folder / family, name) for name in DTYPES}
        torch.save({"reason": reason, "outputs": outputs}, folder / f"{family}.pt")


def outputs_of(folder: Path, dtype: str) -> dict[str, torch.Tensor]:
    """Logits of a prompt and greedy ids of the folder's model."""
    model = load_unmodified(folder, DTYPES[dtype])
    return {"logits": logits_of(model, prompt()), "ids": greedy_ids(model, prompt())}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
