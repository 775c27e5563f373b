"""A hub id is found in huggingface_hub's cache, offline, with its shards as links to blobs."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = "someone/tiny-mixtral"
COMMIT = "0123456789012345678901234567890123456789"

LOAD = """
import sys, warnings
import torch
import moe_runtime
warnings.simplefilter("ignore")
model = moe_runtime.load(sys.argv[1], expert_memory="50%", revision=sys.argv[2] or None)
print(type(model).__name__, moe_runtime.handle(model).report()["cache"]["slots"])
"""


@pytest.fixture
def hub_home(tmp_path: Path) -> Path:
    """HF_HOME with one downloaded model, as snapshot_download lays it out."""
    bundled = Path(__file__).parents[2] / "moe_runtime" / "demo" / "mixtral-stdlib"
    repository = tmp_path / "hub" / f"models--{REPOSITORY.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(bundled.iterdir())):
        blob = repository / "blobs" / f"{number:064d}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / blob.name)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return tmp_path


def load(home: Path, name: str, revision: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LOAD, name, revision]
    environment = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PATH": "", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    return subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("revision", ["", "main", COMMIT])
def test_a_cached_model_loads_offline(hub_home: Path, revision: str) -> None:
    """Law: HF_HOME and HF_HUB_OFFLINE mean what they mean to huggingface_hub."""
    done = load(hub_home, REPOSITORY, revision)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("MixtralForCausalLM ")


def test_a_model_that_is_not_cached_is_named(hub_home: Path) -> None:
    """Law: what cannot be found offline is said, with the remedy."""
    done = load(hub_home, "someone/absent")
    assert done.returncode == 1
    assert (
        "CheckpointError: 'someone/absent' is not a folder, is not in the hub cache" in done.stderr
    )
