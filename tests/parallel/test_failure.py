"""What goes wrong with ranks ends every one of them, with a sentence."""

import socket
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import distributed

import moe_runtime
from moe_runtime.errors import ParallelError, PlacementError
from moe_runtime.integrations.transformers.load import load
from moe_runtime.memory.checkpoint_digest import checkpoint_digest
from moe_runtime.parallel.world import World
from moe_runtime.placement_map import Placement
from tests.command_line import ROOT, environment, run_here
from tests.parallel.rank_pool import free_port
from tests.placements import small_placement
from tests.tiny_checkpoint import NUM_EXPERTS, NUM_LAYERS, save_mixtral

LONG_SECONDS = 120.0  # never waited for


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixtral(tmp_path_factory.mktemp("model"))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As the first of two ranks that torchrun has started."""
    port = str(free_port())
    found = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (found | {"MASTER_PORT": port}).items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def start(rank: int, port: int, how: str, seconds: float) -> subprocess.Popen[str]:
    meeting = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.parallel.failing_rank", how, str(seconds)],
        cwd=ROOT,
        env=environment() | meeting | address,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(("how", "seconds"), [("die", LONG_SECONDS), ("hang", 3.0)])
def test_a_lost_rank_ends_the_others(how: str, seconds: float) -> None:
    """Law: the other rank ends with one sentence: at once where a rank died, else in the time."""
    port = free_port()
    healthy, failing = start(0, port, "work", seconds), start(1, port, how, seconds)
    try:
        _, said = healthy.communicate(timeout=LONG_SECONDS)
        assert healthy.returncode == 3, said
        (sentence,) = [line for line in said.splitlines() if "lost the others" in line]
        assert sentence.startswith("rank 0 of 2 lost the others in all_to_all in MoE layer 0 (")
        assert f"waits up to {seconds:g} s" in sentence
        if how == "die":
            assert failing.wait(LONG_SECONDS) == 9
    finally:
        for process in (healthy, failing):
            process.kill()
            process.communicate()


def test_without_torchrun_the_error_says_how_to_start(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    outcome = run_here(capsys, "generate", folder, "--prompt", "a", "--dispatch", "auto")
    assert outcome.code == 1
    assert "needs RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT" in outcome.error()
    assert "torchrun --nproc-per-node N -m moe_runtime" in outcome.error()


def test_torchrun_without_an_option_is_refused(
    capsys: pytest.CaptureFixture[str], folder: Path, started: pytest.MonkeyPatch
) -> None:
    """Law: ranks that would each run every prompt, and all print, are told what to ask for."""
    outcome = run_here(capsys, "generate", folder, "--prompt", "a")
    assert "torchrun started 2 ranks, and each would run every prompt" in outcome.error()
    assert "--dispatch auto" in outcome.error()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"timeout_seconds": 5.0}, "timeout_seconds has no effect on one process"),
        ({"payload": "int8"}, "payload='int8' has no effect on one process"),
        ({"dispatch": "allreduce", "exact": True}, "allreduce cannot give: a collective adds up"),
        ({"dispatch": "hierarchical", "exact": True}, "partial sums are added up on their way"),
        ({"dispatch": "coherent", "exact": True}, "attention runs with rows of other prompts"),
        ({"attention": "tensor", "exact": True}, "attention 'tensor' cannot give: heads of"),
        ({"dispatch": "auto", "exact": True, "payload": "int8"}, "payload='int8' cannot give: row"),
        ({"dispatch": "auto", "timeout_seconds": -1.0}, "time-out is -1 s; it must be above 0"),
    ],
)
def test_options_that_contradict_are_refused(
    folder: Path, options: dict[str, object], words: str
) -> None:
    with pytest.raises(ParallelError, match=words):
        load(folder, **options)  # type: ignore[arg-type]


def test_an_unknown_dispatcher_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="'fast' is unknown; choose from auto, alltoall, allreduc"):
        load(folder, dispatch="fast")


def test_a_placement_for_another_number_of_ranks_is_refused_before_they_meet(
    folder: Path, started: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Law: nobody waits for anybody."""
    rows = [list(range(NUM_EXPERTS))] * NUM_LAYERS
    placement = small_placement(
        rows, num_experts=NUM_EXPERTS, gpus=3, layer_ids=tuple(range(NUM_LAYERS))
    )
    placement.save(tmp_path / "placement.json")
    with pytest.raises(PlacementError, match="for 3 GPUs and there are 2 ranks; start 3 ranks"):
        load(folder, placement=tmp_path / "placement.json")


def test_a_placement_of_another_model_is_refused(folder: Path, started: pytest.MonkeyPatch) -> None:
    """Law: on the rank that finds it, before any expert is read, and the group is left."""
    started.setenv("WORLD_SIZE", "1")
    with pytest.raises(PlacementError, match=f"2 MoE layers of 4 experts.*{NUM_LAYERS} of 6"):
        load(folder, placement=small_placement(gpus=1))
    moe_runtime.handle(load(folder, dispatch="auto", expert_memory="100%")).close()
    assert not distributed.is_initialized()


def test_weights_of_the_same_shape_are_another_model(
    capsys: pytest.CaptureFixture[str], folder: Path, started: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Law: a solved placement knows its weights by the trace; others are refused, by both digests.

    One that names no weights is compared by shape, and that is said.
    """
    started.setenv("WORLD_SIZE", "1")
    (tmp_path / "prompts.txt").write_text("a prompt\nanother\n")
    trace, file = tmp_path / "t.npz", tmp_path / "p.json"
    recorded = ("--prompts", tmp_path / "prompts.txt", "--max-new-tokens", "2", "-o", trace)
    assert run_here(capsys, "trace", "record", folder, *recorded).code == 0
    for word in ("RANK", "WORLD_SIZE"):  # a placement is solved anywhere
        started.delenv(word)
    solve = ("placement", "solve", trace, "--gpus", "1", "--hold-out", "0", "-o", file)
    assert run_here(capsys, *solve).code == 0
    placement = Placement.load(file)
    assert placement.checkpoint == checkpoint_digest(folder)
    started.setenv("RANK", "0")
    started.setenv("WORLD_SIZE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        moe_runtime.handle(load(folder, placement=file)).close()
    other = save_mixtral(tmp_path / "other", rope_theta=2e4)
    weights = load_file(other / "model.safetensors")
    weights["lm_head.weight"] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    digests = (
        f"checkpoint {placement.checkpoint}, and this is checkpoint {checkpoint_digest(other)}"
    )
    with pytest.raises(PlacementError, match=digests):
        load(other, placement=file)
    with pytest.warns(UserWarning, match="does not say for which weights"):
        model = load(other, placement=replace(placement, checkpoint=""))
    with pytest.raises(PlacementError, match=digests):
        moe_runtime.handle(model).parallel.ask_to_migrate(file)  # type: ignore[union-attr]
    moe_runtime.handle(model).close()


def test_a_rank_that_is_never_started_is_waited_for_in_the_time(
    started: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(
        ParallelError, match=r"rank 0 of 2 cannot meet the others at 127.0.0.1:.*1 s"
    ):
        World.join(timeout_seconds=1)


def test_a_port_in_use_is_named(started: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        started.setenv("MASTER_PORT", str(port))
        with pytest.raises(ParallelError, match=f"127.0.0.1:{port} .*port is free"):
            World.join(timeout_seconds=2)
