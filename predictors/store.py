"""Predictors as files: safetensors, with what belongs to them as JSON in its header."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from moe_runtime.errors import PredictorError
from moe_runtime.predictors.predictor import Fingerprint, Predictor, State
from moe_runtime.predictors.registry import PREDICTORS
from moe_runtime.predictors.split import Split

_KEY = "moe_runtime.predictor"
_FORMAT = 1


def save_predictor(predictor: Predictor, path: Path, split: Split | None = None) -> int:
    """Write one file, under its name only once it is whole; returns its bytes.

    `split` says which sequences of its trace it was not fitted to, where there are such.
    """
    state = predictor.state()
    of = predictor.fingerprint
    about = {
        "format": _FORMAT,
        "name": predictor.name,
        "fingerprint": {field: getattr(of, field) for field in Fingerprint.__slots__},
        "settings": dict(state.settings),
        "split": None if split is None else asdict(split),
    }
    tensors = {name: np.ascontiguousarray(array) for name, array in state.tensors.items()}
    written = save(tensors, metadata={_KEY: json.dumps(about)})
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(written)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return len(written)


def load_predictor(path: Path, expected: Fingerprint | None = None) -> Predictor:
    """The predictor of a file; raises PredictorError if it is damaged or not of `expected`."""
    try:
        with safe_open(path, framework="numpy") as file:
            about = json.loads((file.metadata() or {})[_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        if about["format"] != _FORMAT:
            raise PredictorError(
                f"predictor {path} has format {about['format']}, and this version reads {_FORMAT}; "
                "train it again"
            )
        of = about["fingerprint"]
        fingerprint = Fingerprint(**of | {"layer_ids": tuple(of.get("layer_ids", ()))})
        kind = PREDICTORS.get(about["name"])
        if kind is None:
            raise PredictorError(
                f"predictor {path} is a {about['name']}, which this version does not know; it "
                f"knows {', '.join(PREDICTORS)}"
            )
        _check_numbers(path, tensors)
        found = kind.of_state(fingerprint, State(settings=about["settings"], tensors=tensors))
    except OSError as error:
        raise PredictorError(
            f"predictor {path} cannot be read: {error.strerror or error}; give a file that "
            "`predictor train` wrote"
        ) from error
    except PredictorError:
        raise
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise PredictorError(
            f"predictor {path} is damaged or no predictor ({type(error).__name__}: {error}); "
            "train it again"
        ) from error
    if expected is not None:
        check_fingerprint(found, expected, str(path))
    return found


def split_of(path: Path) -> Split | None:
    """Which split a predictor's file was fitted with; the file has been loaded before."""
    with safe_open(path, framework="numpy") as file:
        found = json.loads(file.metadata()[_KEY]).get("split")
    return None if found is None else Split(**found)


def check_fingerprint(predictor: Predictor, expected: Fingerprint, source: str) -> None:
    """Raise PredictorError, with both fingerprints, if the predictor is of another model."""
    if not predictor.fingerprint.fits(expected):
        raise PredictorError(
            f"predictor {source} belongs to another model: it is of {predictor.fingerprint}; "
            f"wanted is {expected}; train one on a trace of this model"
        )


def _check_numbers(path: Path, tensors: dict[str, Any]) -> None:
    for name, array in tensors.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise PredictorError(
                f"predictor {path}: {name} holds numbers that are not finite; train it again"
            )
