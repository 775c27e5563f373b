"""Laws of a warm start: what was hot is read first, and no file can break a start."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import moe_runtime
from moe_runtime.cache.plec import PLECPolicy
from moe_runtime.expert import ExpertKey
from moe_runtime.warm_start import default_folder
from tests.tiny_checkpoint import save_mixtral


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixtral(tmp_path_factory.mktemp("mixtral"))


def run(model: PreTrainedModel) -> list[int]:
    found: Any = model.generate(  # type: ignore[operator]
        torch.tensor([[5, 9, 33, 70]]), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    return found[0].tolist()  # type: ignore[no-any-return]


def load(folder: Path, state: Path | bool, **arguments: Any) -> PreTrainedModel:
    return moe_runtime.load(folder, expert_memory=0.5, warm_start=state, **arguments)


def state_of(folder: Path, state: Path, **arguments: Any) -> Path:
    """The file that one run leaves."""
    model = load(folder, state, **arguments)
    run(model)
    moe_runtime.handle(model).close()
    (file,) = state.glob("*.npz")
    return file


def resident(model: PreTrainedModel) -> set[ExpertKey]:
    return set(moe_runtime.handle(model).engine.cache._slots)


@pytest.mark.parametrize("policy", ["lru", "lfu", "plec"])
def test_what_was_hot_is_read_first(folder: Path, tmp_path: Path, policy: str) -> None:
    """Law: the next start has in its slots what the last one had, and needs no demand for it."""
    model = load(folder, tmp_path / "state", policy=policy)
    expected, owner = run(model), moe_runtime.handle(model)
    hot = resident(model)
    owner.close()
    again = load(folder, tmp_path / "state", policy=policy)
    assert resident(again) == hot
    owner = moe_runtime.handle(again)
    for load_ in list(owner.engine._loads.values()):
        load_.settle()
    assert owner.engine.reader.bytes_read > 0
    with owner.engine.open_layer(0, [key.expert for key in sorted(hot) if key.layer == 0]):
        pass
    assert owner.engine.cache.counts[0].misses == 0
    assert run(again) == expected
    owner.close()


def test_what_policy_gate_and_predictor_learnt_is_kept(folder: Path, tmp_path: Path) -> None:
    """Law: plec's model and the gates' chances go on where they were."""
    arguments = {"policy": "plec", "predictor": "gate_lookahead"}
    model = load(folder, tmp_path, **arguments)
    owner = moe_runtime.handle(model)
    run(model)
    assert owner.foresight is not None
    chances = owner.foresight.predictor.chances.copy()  # type: ignore[attr-defined]
    policy = owner.engine.cache.policy
    assert isinstance(policy, PLECPolicy)
    learnt = policy.state()
    owner.close()
    again = moe_runtime.handle(load(folder, tmp_path, **arguments))
    assert again.foresight is not None
    assert np.array_equal(again.foresight.predictor.chances, chances)  # type: ignore[attr-defined]
    policy = again.engine.cache.policy
    assert isinstance(policy, PLECPolicy)
    for name, array in policy.state().items():
        assert np.array_equal(array, learnt[name]), name
    again.close()


def damage(file: Path, kind: str) -> None:
    with np.load(file) as read:
        arrays = dict(read)
    about = json.loads(str(arrays["about"]))
    if kind == "cut short":
        file.write_bytes(file.read_bytes()[:-40])
        return
    if kind == "no archive":
        file.write_text("hot, hot, hot")
        return
    if kind == "empty":
        file.write_bytes(b"")
        return
    if kind == "another checkpoint":
        about["checkpoint"] = "0123456789abcdef"
    elif kind == "another format":
        about["format"] = 99
    elif kind == "no such expert":
        arrays["keys"][0] = (0, 99)
    elif kind == "negative layer":
        arrays["keys"][0] = (-1, 0)
    elif kind == "keys of floats":
        arrays["keys"] = arrays["keys"].astype(np.float32)
    elif kind == "objects":
        arrays["keys"] = np.array([{}], dtype=object)
    elif kind == "no keys":
        del arrays["keys"]
    elif kind == "about is a list":
        about = []
    elif kind == "policy is NaN":
        arrays["policy.pair"] = np.full_like(arrays["policy.pair"], np.nan)
    elif kind == "gate is NaN":
        about["gate"]["means"] = {"read": float("nan")}
    elif kind == "chances beyond 1":
        arrays["chances"] = arrays["chances"] + 1
    else:
        raise AssertionError(kind)
    arrays["about"] = np.array(json.dumps(about))
    np.savez(file, **arrays)


@pytest.mark.parametrize(
    "kind",
    [
        "cut short", "no archive", "empty", "another checkpoint", "another format",
        "no such expert", "negative layer", "keys of floats", "objects", "no keys",
        "about is a list", "policy is NaN", "gate is NaN", "chances beyond 1",
    ],
)  # fmt: skip
def test_a_damaged_or_foreign_file_is_ignored_with_one_line(
    folder: Path, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Law: whatever the file holds, the model starts empty, says so once, and runs."""
    arguments = {"policy": "plec", "predictor": "gate_lookahead"}
    file = state_of(folder, tmp_path, **arguments)
    damage(file, kind)
    with caplog.at_level(logging.WARNING, "moe_runtime"):
        model = load(folder, tmp_path, **arguments)
    said = [record.message for record in caplog.records if "warm start" in record.message]
    assert len(said) == 1
    assert "is ignored" in said[0]
    assert "\n" not in said[0]
    assert resident(model) == set()
    assert len(run(model)) == 16
    moe_runtime.handle(model).close()


def test_opting_out_reads_and_writes_nothing(folder: Path, tmp_path: Path) -> None:
    """Law: with warm_start=False no file is read or left."""
    state_of(folder, tmp_path)
    model = load(folder, False)
    assert resident(model) == set()
    run(model)
    moe_runtime.handle(model).close()
    assert not default_folder().exists()


def test_the_file_is_whole_or_not_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Law: a disk that fills up costs the state and one line, and leaves the old file."""
    file = state_of(folder, tmp_path)
    before = file.read_bytes()

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    model = load(folder, tmp_path)
    run(model)
    monkeypatch.setattr(np, "savez", full)
    with caplog.at_level(logging.WARNING, "moe_runtime"):
        moe_runtime.handle(model).close()
    assert "is not written (No space left on device)" in caplog.text
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".json"] == [file.name]
    assert file.read_bytes() == before


def test_restoring_keeps_what_was_hot(folder: Path, tmp_path: Path) -> None:
    """Law: the state is that of the model as it ran, not of reading all experts back."""
    model = load(folder, tmp_path)
    run(model)
    hot = resident(model)
    moe_runtime.handle(model).restore()
    again = load(folder, tmp_path)
    assert resident(again) == hot
    moe_runtime.handle(again).close()


def test_the_users_cache_is_where_it_is_asked_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: XDG_CACHE_HOME decides, where it is set."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    from moe_runtime import warm_start

    assert warm_start.default_folder() == tmp_path / "moe_runtime"
    assert warm_start.state_folder(True) == tmp_path / "moe_runtime"
    assert warm_start.state_folder(False) is None
    assert warm_start.state_folder("here") == Path("here")
