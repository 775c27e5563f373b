"""What a runtime knew when it closed, for the next start with the same checkpoint."""

import json
import logging
import os
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from moe_runtime.cache.plec import PLECPolicy
from moe_runtime.engine import ExpertEngine
from moe_runtime.expert import ExpertKey
from moe_runtime.foresight import Foresight
from moe_runtime.predictors.live_gates import LiveGates
from moe_runtime.scheduling.benefit import BenefitGate

logger = logging.getLogger("moe_runtime")

_FORMAT = 1
_POLICY = "policy."  # before the names of a policy's arrays


class WarmStart:
    """One file: the experts in slots, hottest first, and what policy, gate and predictor learnt.

    A file that is damaged or of something else is ignored with one line. It is written under its
    name only once it is whole.
    """

    def __init__(
        self,
        path: Path,
        *,
        engine: ExpertEngine,
        foresight: Foresight | None,
        shape: tuple[int, int],
        checkpoint: str,
    ) -> None:
        self.path = path
        self._engine = engine
        self._foresight = foresight
        self._shape = shape
        self._checkpoint = checkpoint

    def recall(self) -> bool:
        """Begin to read what was hot, behind all demand; whether there was anything to recall."""
        if not self.path.is_file():
            return False
        try:
            with np.load(self.path, allow_pickle=False) as file:
                found = {name: file[name] for name in file.files}
            about = json.loads(str(found["about"]))
            self._check(about)
            keys = self._keys(found["keys"])
            if about["policy"] == self._engine.cache.policy.name:
                self._recall_policy(found)
            self._recall_foresight(about, found)
        except (OSError, KeyError, TypeError, ValueError, AttributeError, EOFError,
                zipfile.BadZipFile) as error:  # fmt: skip
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            logger.warning("warm start: %s is ignored (%s)", self.path, reason)
            return False
        self._engine.warm(keys)
        return True

    def save(self) -> None:
        """Write what is known now; the engine's cache is of no use after this."""
        about = {
            "format": _FORMAT,
            "checkpoint": self._checkpoint,
            "shape": list(self._shape),
            "policy": self._engine.cache.policy.name,
        }
        arrays: dict[str, Any] = {}
        policy = self._engine.cache.policy
        if isinstance(policy, PLECPolicy):
            arrays |= {_POLICY + name: array for name, array in policy.state().items()}
        if self._foresight is not None:
            about["predictor"] = self._foresight.predictor.name
            if isinstance(self._foresight.gate, BenefitGate):
                about["gate"] = self._foresight.gate.state()
            if isinstance(self._foresight.predictor, LiveGates):
                arrays["chances"] = self._foresight.predictor.chances
        arrays["keys"] = np.array(self._engine.give_up_all(), np.int32).reshape(-1, 2)
        arrays["about"] = np.array(json.dumps(about))
        try:
            self._write(arrays)
        except OSError as error:  # a full disk must not keep a model from being closed
            logger.warning("warm start: %s is not written (%s)", self.path, error.strerror or error)

    def _write(self, arrays: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(prefix=".partial-", dir=self.path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                np.savez(file, **arrays)
            Path(partial).replace(self.path)
        finally:
            Path(partial).unlink(missing_ok=True)

    def _check(self, about: dict[str, Any]) -> None:
        if about["format"] != _FORMAT:
            raise ValueError(f"its format is {about['format']}, and {_FORMAT} is read")
        if about["checkpoint"] != self._checkpoint or tuple(about["shape"]) != self._shape:
            raise ValueError(
                f"it is of checkpoint {about['checkpoint']}, and this is {self._checkpoint}"
            )

    def _keys(self, array: np.ndarray[Any, Any]) -> list[ExpertKey]:
        if array.ndim != 2 or array.shape[1] != 2 or array.dtype.kind != "i":
            raise ValueError(f"keys are {array.dtype}{list(array.shape)}")
        layers = self._engine.tensor_map.layers
        keys = [ExpertKey(layer, expert) for layer, expert in array.tolist()]
        for key in keys:
            is_layer = 0 <= key.layer < len(layers)
            if not (is_layer and 0 <= key.expert < layers[key.layer].num_experts):
                raise ValueError(f"there is no expert {key.expert} in layer {key.layer}")
        return list(dict.fromkeys(keys))

    def _recall_policy(self, found: dict[str, Any]) -> None:
        policy = self._engine.cache.policy
        if isinstance(policy, PLECPolicy):
            policy.restore(
                {
                    name.removeprefix(_POLICY): array
                    for name, array in found.items()
                    if name.startswith(_POLICY)
                }
            )

    def _recall_foresight(self, about: dict[str, Any], found: dict[str, Any]) -> None:
        foresight = self._foresight
        if foresight is None or about.get("predictor") != foresight.predictor.name:
            return
        predictor = foresight.predictor
        if isinstance(predictor, LiveGates):
            chances = found["chances"]
            if chances.shape != predictor.chances.shape or not np.all(
                (chances >= 0) & (chances <= 1)
            ):
                raise ValueError("what was learnt of the gates is damaged")
            predictor.chances[:] = chances
        if isinstance(foresight.gate, BenefitGate):
            foresight.gate.restore(about["gate"])


def state_file(folder: Path, checkpoint: str) -> Path:
    """Of the checkpoint with this digest."""
    return folder / f"{checkpoint}.npz"


def state_folder(warm_start: bool | str | Path) -> Path | None:
    """Where `load` keeps what it was told to: nowhere, in the user's cache, or in a folder."""
    if isinstance(warm_start, bool):
        return default_folder() if warm_start else None
    return Path(warm_start)


def default_folder() -> Path:
    """Where this user's programs keep what they can do without: `$XDG_CACHE_HOME` or its like."""
    asked = os.environ.get("XDG_CACHE_HOME")
    if asked:
        return Path(asked) / "moe_runtime"
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "moe_runtime"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "moe_runtime"
    return Path.home() / ".cache" / "moe_runtime"
