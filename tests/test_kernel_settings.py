"""Kernel settings come from the GPU's file, else from the untuned ones, which is said once."""

import warnings
from pathlib import Path
from typing import Any

import pytest

from moe_runtime.errors import ConfigError
from moe_runtime.kernel_settings import KernelSettings, file_name, layer_settings

LAYER: dict[str, Any] = {
    "num_experts": 64,
    "model_dim": 2048,
    "ffn_dim": 1024,
    "value_bytes": 2,
}
TILE = "{block_outputs: 16, block_inputs: 64, num_warps: 4, num_stages: 2, group_blocks: 1}"


def write(folder: Path, gpu: str, *entries: str) -> None:
    lines = [f"gpu: {gpu}", "source: measured", "entries:"]
    for entry in entries:
        lines.append(f"- {{{entry}, value_bytes: 2, gate_up: {TILE}, down: {TILE}}}")
    (folder / file_name(gpu)).write_text("\n".join(lines))


@pytest.mark.parametrize("value_bytes", [2, 4])
@pytest.mark.parametrize("num_pairs", [1, 8, 65, 10_000, 10**8])
def test_the_untuned_settings_hold_every_number_of_rows(num_pairs: int, value_bytes: int) -> None:
    layer = {**LAYER, "value_bytes": value_bytes}
    assert KernelSettings.untuned().find(num_pairs=num_pairs, **layer) is not None


def test_the_fewest_rows_that_suffice_are_chosen() -> None:
    found = [
        KernelSettings.untuned().find(num_pairs=num_pairs, **LAYER)
        for num_pairs in (8, 64, 65, 128, 129, 64 * 16, 64 * 16 + 1, 64 * 65)
    ]
    assert [entry and entry.block_rows for entry in found] == [1, 1, 2, 2, 16, 16, 64, 128]


def test_the_gpus_own_file_and_shape_come_first(tmp_path: Path) -> None:
    write(
        tmp_path,
        "Test GPU 1",
        "max_rows_per_expert: 4, block_rows: 4",
        "max_rows_per_expert: 9, block_rows: 8, model_dim: 2048, ffn_dim: 1024",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own = layer_settings("Test GPU 1", num_pairs=8, folder=tmp_path, **LAYER)
        assert own.block_rows == 8
        other = {**LAYER, "ffn_dim": 1}
        assert layer_settings("Test GPU 1", num_pairs=8, folder=tmp_path, **other).block_rows == 4


def test_a_missing_entry_falls_back_and_says_so_once(tmp_path: Path) -> None:
    write(tmp_path, "Test GPU 2", "max_rows_per_expert: 1, block_rows: 4")
    for gpu in ("Test GPU 2", "Test GPU 3"):  # without the entry, without a file
        with pytest.warns(UserWarning, match=f"no tuned kernel settings for {gpu}"):
            found = layer_settings(gpu, num_pairs=1000, folder=tmp_path, **LAYER)
        assert found == KernelSettings.untuned().find(num_pairs=1000, **LAYER)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            layer_settings(gpu, num_pairs=2000, folder=tmp_path, **LAYER)


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ("max_rows_per_expert: 1, block_rows: 3", r"block_rows \(3\) must be a power of two"),
        ("max_rows_per_expert: 1, block_rows: 2, model_dim: 8", "together or not at all"),
        ("max_rows_per_expert: 1, block_row: 2", "block_rows"),
        ("max_rows_per_expert: 0, block_rows: 2", "max_rows_per_expert"),
    ],
)
def test_a_damaged_file_is_refused(entry: str, complaint: str, tmp_path: Path) -> None:
    write(tmp_path, "Test GPU 4", entry)
    with pytest.raises(ConfigError, match=complaint):
        layer_settings("Test GPU 4", num_pairs=1, folder=tmp_path, **LAYER)


def test_a_file_of_another_gpu_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "Test-GPU-5", "max_rows_per_expert: 1, block_rows: 4")
    with pytest.raises(ConfigError, match="is for Test-GPU-5, not for Test GPU 5; rename"):
        layer_settings("Test GPU 5", num_pairs=1, folder=tmp_path, **LAYER)
