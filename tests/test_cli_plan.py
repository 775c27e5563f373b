"""Laws of `moe-runtime plan`: what it prints, how light it is, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_line import environment, run_here
from tests.simulate.traces import make_trace

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "moe_runtime" / "demo" / "mixtral-stdlib"
MACHINE = ROOT / "configs" / "hardware" / "2-core-epyc.yaml"


def test_json_is_one_object_with_the_promised_keys(capsys: pytest.CaptureFixture[str]) -> None:
    done = run_here(capsys, "plan", "olmoe-1b-7b", "--hardware", MACHINE, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert set(found) >= {
        "bottleneck", "tokens_per_second", "settings", "memory", "runner_up", "what_would_help",
        "lens", "assumptions",
    }  # fmt: skip
    assert found["settings"]["num_slots"] == 1024


def test_a_plan_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from moe_runtime.cli.app import main; "
        f"code = main(['plan', 'mixtral-8x7b', '--hardware', {str(MACHINE)!r}]); "
        "sys.exit(code or bool({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bottleneck" in done.stdout


def test_this_machine_is_measured_where_none_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    done = run_here(capsys, "plan", DEMO, "--prompt-tokens", "16", "--new-tokens", "16")
    assert done.code == 0, done.err
    assert "48 in" in done.out
    done = run_here(capsys, "plan", DEMO, "--hardware", "rtx9099", "--json",
                    "--prompt-tokens", "16", "--new-tokens", "16")  # fmt: skip
    assert "no hardware is called 'rtx9099'" in done.err
    assert json.loads(done.out)["settings"]["num_slots"] == 48


def test_hit_rates_may_come_from_a_trace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = make_trace(0, num_tokens=60, rows_per_step=1)
    trace.save(tmp_path / "T.npz")
    done = run_here(
        capsys, "plan", "qwen3-30b-a3b", "--hardware", MACHINE, "--trace", tmp_path / "T.npz",
        "--json",
    )  # fmt: skip
    assert "over a trace of 60 tokens" in json.loads(done.out)["assumptions"][0]


def test_a_plot_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "plan.svg"
    done = run_here(capsys, "plan", "qwen3-30b-a3b", "--hardware", "l4", "--plot", plot)
    assert done.code == 0, done.err
    assert "memory and arithmetic" in plot.read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("mixtral-8x7b", "--memory", "2GiB"), "the smallest budget that works is"),
        (("mixtral-8x7b", "--memory", "33%"), "'33%' is not a size; write 16GiB"),
        (("mixtral-8x7", "--memory", "2GiB"), "the nearest is mixtral-8x7b"),
        (("mixtral-8x7b", "--batch", "some"), "--batch 'some' is neither auto nor a number"),
        (("mixtral-8x7b", "--batch", "0"), "--batch '0' is neither auto nor a number"),
        (("mixtral-8x7b", "--new-tokens", "40000"), "exceed the context of 32768 tokens"),
        (("mixtral-8x7b", "--plot", "plan.doc"), "ends in none of"),
        (("mixtral-8x7b", "--plot", "nowhere/plan.png"), "there is no folder nowhere"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in run_here(capsys, "plan", *arguments, "--hardware", MACHINE).error()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("read_gbps: 32.86", "read_gbps: 32860000"), "memory.read_gbps (32860000.0) is outside"),
        (("  read_gbps: 32.86\n", ""), "memory.read_gbps is missing"),
        (("gpus: []", "gpu: []"), "unknown key gpu, the nearest is gpus"),
    ],
)
def test_a_hardware_file_with_absurd_or_missing_values_is_named(
    change: tuple[str, str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = MACHINE.read_text()
    assert change[0] in text
    (tmp_path / "mine.yaml").write_text(text.replace(*change))
    error = run_here(capsys, "plan", "tiny", "--hardware", tmp_path / "mine.yaml").error()
    assert said in error
    assert "moe-runtime probe" in error
