"""The model shapes that a benchmark can imitate, read from `configs/models/`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moe_runtime.errors import ConfigError
from moe_runtime.model_preset import REMEDY, nearest, preset_file, read_model_preset

# What families call the number of routed experts in a layer, those of a token, and layers.
_EXPERT_COUNTS = (
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "ffn_config.moe_num_experts",
)
_TOP_K = ("num_experts_per_tok", "ffn_config.moe_top_k")
_EXPERT_WIDTHS = ("moe_intermediate_size", "ffn_config.ffn_hidden_size", "intermediate_size")
_LAYER_COUNTS = ("num_hidden_layers", "n_layers")

# Read by models, yet declared by few config classes.
_UNDECLARED = ("head_dim",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """Shapes of one published model: enough to build it with random weights."""

    name: str
    source: str  # where the figures were taken from
    model_type: str  # as transformers calls the architecture
    fields: Mapping[str, Any]  # of the transformers config

    @property
    def num_layers(self) -> int:
        return int(self._field(_LAYER_COUNTS)[1])

    @property
    def num_experts(self) -> int:
        """Routed experts in a layer."""
        return int(self._field(_EXPERT_COUNTS)[1])

    @property
    def top_k(self) -> int:
        return int(self._field(_TOP_K)[1])

    def _field(self, names: tuple[str, ...]) -> tuple[str, Any]:
        """The first of `names` that is set, and its value; a dot leads into a nested config."""
        for name in names:
            outer, _, inner = name.rpartition(".")
            fields = self.fields.get(outer, {}) if outer else self.fields
            if inner in fields:
                return name, fields[inner]
        raise ConfigError(f"preset {self.name} has none of {', '.join(names)}; {REMEDY}")

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
        fields = {**self.fields}
        for names, count in (
            (_LAYER_COUNTS, num_layers),
            (_EXPERT_COUNTS, num_experts),
            (_TOP_K, top_k),
        ):
            if count is None:
                continue
            outer, _, inner = self._field(names)[0].rpartition(".")
            if outer:
                fields[outer] = {**fields[outer], inner: count}
            else:
                fields[inner] = count
        changed = Preset(
            name=self.name,
            source=self.source,
            model_type=self.model_type,
            fields=fields,
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
        return int(config.hidden_size), int(self._field(_EXPERT_WIDTHS)[1])


def load_preset(name: str) -> Preset:
    """The preset called `name`. Raises ValueError, naming the nearest, when there is none."""
    return read_preset(preset_file(name))


def read_preset(file: Path) -> Preset:
    """The preset in `file`, called as the file is. Raises ConfigError, naming what is wrong."""
    content = read_model_preset(file)
    if content.model_type not in CONFIG_MAPPING:
        raise ConfigError(
            f"{file}: transformers knows no model_type {content.model_type!r}"
            f"{nearest(content.model_type, CONFIG_MAPPING)}; {REMEDY}"
        )
    known = CONFIG_MAPPING[content.model_type]()
    for field in content.fields:
        if field not in _UNDECLARED and not hasattr(known, field):
            raise ConfigError(
                f"{file}: unknown key fields.{field}{nearest(field, known.to_dict())}; {REMEDY}"
            )
    return Preset(
        name=file.stem,
        source=content.source,
        model_type=content.model_type,
        fields=content.fields,
    )
