"""`moe-runtime bench offload`: one JSON object, a page, and bad input refused before any work."""

import json
from pathlib import Path

import pytest

from moe_runtime.measure.bench import one_table, rounds
from moe_runtime.measure.bench.gate import Gate
from moe_runtime.measure.bench.markdown import COLUMNS
from tests.command_line import run_here
from tests.tiny_checkpoint import save_mixtral

ROW_KEYS = {
    "name", "title", "outcome", "note", "ms_per_token", "num_tokens", "times_ours",
    "bytes_read_per_token", "gate", "own_bytes", "cap_bytes", "peak_memory_bytes",
    "peak_resident_bytes", "hit_rate", "bytes_missed_per_token", "bytes_read_over_missed", "facts",
}  # fmt: skip


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixtral(tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(autouse=True)
def hardly_any_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are for honest speeds, and no speed is looked at here."""
    monkeypatch.setattr(rounds, "_PAUSE_SECONDS", 0.01)


def quick(model_folder: Path, work_folder: Path) -> list[str | Path]:
    return [
        "bench", "offload", "--model", model_folder, "--residency", "100",
        "--peers", "transformers", "--steps", "12", "--seconds", "5", "--work-folder", work_folder,
    ]  # fmt: skip


@pytest.mark.slow
def test_json_is_one_object_and_the_page_is_written(
    capsys: pytest.CaptureFixture[str], model_folder: Path, tmp_path: Path
) -> None:
    page = tmp_path / "report.md"
    done = run_here(
        capsys, *quick(model_folder, tmp_path / "work"), "--exact", "--json", "-o", page
    )
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found.keys() == {
        "is_green", "command", "machine", "versions", "commit", "model", "tables", "comparisons",
    }  # fmt: skip
    assert found["machine"].keys() == {
        "cpu",
        "cpu_flags",
        "cores",
        "memory_bytes",
        "read_ahead_kib",
        "gpu",
        "kernel",
    }
    assert {"moe_runtime", "python", "torch", "transformers"} <= found["versions"].keys()
    (table,) = found["tables"]
    assert table["capped"] is None
    assert table["residency"] == 1.0
    assert all(row.keys() == ROW_KEYS for row in table["rows"])
    ours, eager, _ = table["rows"]
    assert ours["gate"]["is_bit_equal"]
    assert ours["ms_per_token"].keys() == {"median", "low", "high"}
    assert eager["times_ours"]["median"] > 0
    text = page.read_text()
    assert f"| {' | '.join(COLUMNS)} |" in text
    assert "| moe_runtime | " in text
    assert "step with the experts as a no-op" in text


@pytest.mark.slow
def test_a_red_gate_prints_no_speed_and_ends_with_1(
    capsys: pytest.CaptureFixture[str],
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def red(*_: object, **__: object) -> Gate:
        return Gate(
            is_green=False, is_bit_equal=False, relative_error=0.3, worst_error=0.3, tolerance=0.0,
            same_top_1=0.5, num_tokens=1,
        )  # fmt: skip

    monkeypatch.setattr(one_table, "compare_logits", red)
    done = run_here(capsys, *quick(model_folder, tmp_path / "work"))
    assert done.code == 1
    assert "gate red" in done.out
    assert (
        "computes something else: RED: error 3.0e-01 (worst 3.0e-01), top-1 50%, wanted equal bits"
        in done.out
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--residency", "0"], "--residency '0' is not a percentage above 0 and up to 100"),
        (["--residency", "65,x"], "--residency 'x' is not a percentage"),
        (["--peers", "vllm"], "peer 'vllm' is unknown; choose all, none, or from transformers"),
        (["--routing", "own"], "routing 'own' is unknown; write forced, uniform or trace:FILE"),
        (["--routing", "trace:absent.npz"], "absent.npz"),
        (["--like", "olmo", "--peers", "none"], "no model preset is called 'olmo'"),
        (["--like", "tiny", "--model", "."], "give --model, or --like and --layers, not both"),
        (["--model", "."], "holds no config.json"),
        (["-o", "absent/report.md"], "there is no folder absent"),
        (["--work-folder", "a-file"], "work folder a-file"),
    ],
)
def test_bad_input_is_refused_before_any_work(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a-file").touch()
    assert said in run_here(capsys, "bench", "offload", *arguments).error()
    assert not list(tmp_path.rglob("*.safetensors"))
