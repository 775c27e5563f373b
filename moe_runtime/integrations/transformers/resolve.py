"""Finds a model's folder and config, on disk or through the hub's cache."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    StrictDataclassError,
)
from transformers import AutoConfig, PreTrainedConfig, __version__

from moe_runtime.errors import CheckpointError, UnsupportedModelError
from moe_runtime.integrations.transformers.quantisation import (
    Quantisation,
    plain_config,
    quantisation_of,
    weights_of,
)
from moe_runtime.memory.checkpoint import Checkpoint

# Everything a model needs but weights in other formats, which can be as large again.
_WANTED_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py", "*.tiktoken")

# Arguments of from_pretrained that mean the same in load(). What is neither here, nor an argument
# of load(), nor an attribute of the model's config raises: nothing is swallowed.
ARGUMENTS = frozenset(
    {
        "attn_implementation", "config", "dtype", "generation_config", "key_mapping",
        "output_loading_info", "torch_dtype",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model that is on this machine."""

    folder: Path
    config: PreTrainedConfig
    quantisation: Quantisation | None

    def open_checkpoint(self) -> Checkpoint:
        """The weights by name: where they are quantised, what their values and scales stand for."""
        return weights_of(Checkpoint.open(self.folder), self.quantisation)

    def model_arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What `from_pretrained` must get to build the plain model, quantised or not.

        `given` are its arguments, and attributes of the config that are to be changed.
        """
        if self.quantisation is None:
            return dict(given)
        changes = {k: v for k, v in given.items() if k not in ARGUMENTS and hasattr(self.config, k)}
        config = plain_config(given.get("config") or self.config, changes)
        return {k: v for k, v in given.items() if k not in changes} | {"config": config}


def resolve_model(
    model: str | Path,
    *,
    revision: str | None = None,
    subfolder: str = "",
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
) -> ResolvedModel:
    """The folder of `model`, downloading it if it is a hub id, and its config.

    `HF_HUB_OFFLINE` and `HF_HOME` mean what they mean to huggingface_hub. Raises CheckpointError
    when nothing can be found and UnsupportedModelError for a config that this version cannot run.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        folder = _download(str(model), revision, token, cache_dir, local_files_only)
    folder = folder / subfolder
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} holds no config.json; give the folder of a transformers model or a hub id"
        )
    try:
        config = AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (ValueError, KeyError, OSError, TypeError, StrictDataclassError) as error:
        if "trust_remote_code" in str(error):
            raise UnsupportedModelError(
                f"{model} runs code of its own; read it, and if you trust it, pass "
                "trust_remote_code=True (--trust-remote-code)"
            ) from error
        reason = " ".join(str(error).split()).partition(". ")[0].rstrip(".")
        raise UnsupportedModelError(
            f"{folder / 'config.json'} is not a config that transformers {__version__} knows "
            f"({reason}); check it, or update transformers"
        ) from error
    return ResolvedModel(folder, config, quantisation_of(config, str(model)))


def _download(
    model: str,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | Path | None,
    local_files_only: bool,
) -> Path:
    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only or constants.HF_HUB_OFFLINE,
                allow_patterns=list(_WANTED_FILES),
            )
        )
    except HFValidationError:
        raise CheckpointError(
            f"{model!r} is neither a folder nor a hub id (such as 'allenai/OLMoE-1B-7B-0924')"
        ) from None
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{model!r} is not a folder, is not in the hub cache, and cannot be downloaded now "
            "(offline, or HF_HUB_OFFLINE is set): check the path or the connection"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"{model!r} cannot be downloaded: {str(error).splitlines()[0]}"
        ) from error
