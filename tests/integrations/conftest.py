"""Tiny checkpoints on disk, each saved once."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.tiny_models import tiny_model

DTYPES = {"mixtral": torch.float32, "mixtral_bf16": torch.bfloat16, "gpt_oss": torch.float32}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name -> folder in hub layout: `mixtral`, `mixtral_bf16`, `gpt_oss`, `mixtral_tied`."""
    folders: dict[str, Path] = {}

    def folder_of(name: str) -> Path:
        if name not in folders:
            folder = tmp_path_factory.mktemp(name)
            model = tiny_model("gpt_oss" if name == "gpt_oss" else "mixtral", seed=len(name))
            if name == "mixtral_tied":
                model.config.tie_word_embeddings = True
                model.tie_weights()
            model.generation_config.repetition_penalty = 1.25
            model.to(DTYPES.get(name, torch.float32)).save_pretrained(folder)
            folders[name] = folder
        return folders[name]

    return folder_of
