"""What tests of integrations share: tiny checkpoints, each saved once, and fake tiers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.fake_streams import FakeMachine
from tests.fake_tiers import put_tiers_below
from tests.tiny_models import tiny_model

DTYPES = {"mixtral": torch.float32, "mixtral_bf16": torch.bfloat16, "gpt_oss": torch.float32}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    """Models on the CPU get the tiers of an accelerator, whose work runs as it is queued."""
    return put_tiers_below(monkeypatch)


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
