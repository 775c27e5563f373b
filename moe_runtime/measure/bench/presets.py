"""The model shapes that a benchmark can imitate, read from `configs/models/`."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moe_runtime.config import load_config
from moe_runtime.errors import ConfigError

_FOLDER = Path(__file__).resolve().parents[2] / "configs" / "models"
_REMEDY = "mend the file, or name another preset"
# What families call the number of routed experts in a layer.
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")

# Read by models, yet declared by few config classes.
_UNDECLARED = ("head_dim",)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Content:
    """What a file holds."""

    source: str
    model_type: str
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """Shapes of one published model: enough to build it with random weights."""

    name: str
    source: str  # where the figures were taken from
    model_type: str  # as transformers calls the architecture
    fields: Mapping[str, Any]  # of the transformers config

    @property
    def num_layers(self) -> int:
        return int(self.fields["num_hidden_layers"])

    @property
    def num_experts(self) -> int:
        """Routed experts in a layer."""
        return int(self.fields[self._expert_count])

    @property
    def top_k(self) -> int:
        return int(self.fields["num_experts_per_tok"])

    @property
    def _expert_count(self) -> str:
        return next(name for name in _EXPERT_COUNTS if name in self.fields)

    def changed(
        self,
        *,
        num_layers: int | None = None,
        num_experts: int | None = None,
        top_k: int | None = None,
    ) -> "Preset":
        """The same shapes with other counts; None keeps the preset's own.

        Layers are counted from the first, dense ones included.
        """
        changes = {
            "num_hidden_layers": num_layers,
            self._expert_count: num_experts,
            "num_experts_per_tok": top_k,
        }
        changes = {name: count for name, count in changes.items() if count is not None}
        changed = Preset(
            name=self.name,
            source=self.source,
            model_type=self.model_type,
            fields={**self.fields, **changes},
        )
        changed._check_counts()
        return changed

    def _check_counts(self) -> None:
        num_dense = int(self.fields.get("first_k_dense_replace", 0))
        if self.num_layers <= num_dense:
            raise ValueError(
                f"{self.num_layers} layers of {self.name} hold no experts: the first {num_dense} "
                f"layers have none; ask for {num_dense + 1} or more"
            )
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(
                f"a token cannot use {self.top_k} of {self.num_experts} experts of {self.name}; "
                f"give a top-k between 1 and {self.num_experts}"
            )

    def config(self) -> PreTrainedConfig:
        """The transformers config with these shapes."""
        return AutoConfig.for_model(self.model_type, **self.fields)

    def expert_sizes(self) -> tuple[int, int]:
        """Model dim and ffn dim of one expert."""
        config = self.config()
        ffn = self.fields.get("moe_intermediate_size", config.intermediate_size)
        return int(config.hidden_size), int(ffn)


def preset_names() -> list[str]:
    """All presets, sorted."""
    return sorted(file.stem for file in _FOLDER.glob("*.yaml"))


def load_preset(name: str) -> Preset:
    """The preset called `name`. Raises ValueError, naming the nearest, when there is none."""
    names = preset_names()
    if name not in names:
        raise ValueError(
            f"no model preset is called {name!r}{_nearest(name, names)}; "
            f"there are {', '.join(names)}"
        )
    return read_preset(_FOLDER / f"{name}.yaml")


def read_preset(file: Path) -> Preset:
    """The preset in `file`, called as the file is. Raises ConfigError, naming what is wrong."""
    content = load_config(_Content, file, remedy=_REMEDY)
    if content.model_type not in CONFIG_MAPPING:
        raise ConfigError(
            f"{file}: transformers knows no model_type {content.model_type!r}"
            f"{_nearest(content.model_type, CONFIG_MAPPING)}; {_REMEDY}"
        )
    known = CONFIG_MAPPING[content.model_type]()
    for field in content.fields:
        if field not in _UNDECLARED and not hasattr(known, field):
            raise ConfigError(
                f"{file}: unknown key fields.{field}{_nearest(field, known.to_dict())}; {_REMEDY}"
            )
    return Preset(
        name=file.stem,
        source=content.source,
        model_type=content.model_type,
        fields=content.fields,
    )


def _nearest(name: str, names: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f", the nearest is {found[0]}" if found else ""
