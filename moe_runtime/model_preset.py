"""A file of `configs/models/`: the config fields of one published model."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moe_runtime.config import load_config

FOLDER = Path(__file__).resolve().parent / "configs" / "models"
REMEDY = "mend the file, or name another preset"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPreset:
    """What a file holds. `expert_format` is that of the published experts, if not the dtype."""

    source: str  # where the figures were taken from
    model_type: str  # as transformers calls the architecture
    expert_format: Literal["fp8", "mxfp4"] | None = None
    fields: dict[str, Any]  # of the transformers config


def preset_names() -> list[str]:
    """All presets, sorted."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def preset_file(name: str) -> Path:
    """Of the preset called `name`. Raises ValueError, naming the nearest, when there is none."""
    names = preset_names()
    if name not in names:
        raise ValueError(
            f"no model preset is called {name!r}{nearest(name, names)}; "
            f"there are {', '.join(names)}"
        )
    return FOLDER / f"{name}.yaml"


def read_model_preset(file: Path) -> ModelPreset:
    """What `file` holds; the names of its fields are not checked. Raises ConfigError."""
    return load_config(ModelPreset, file, remedy=REMEDY)


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of a sentence that names the most similar of `names`, or nothing."""
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f", the nearest is {found[0]}" if found else ""
