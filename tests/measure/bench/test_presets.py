"""The presets are shapes of published models, and nothing else passes for one."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_runtime.errors import ConfigError
from moe_runtime.measure.bench.presets import load_preset, read_preset
from moe_runtime.model_preset import preset_names

# Parameters in millions as published (tiny: counted by hand).
MILLIONS = {
    "dbrx": 131_597,
    "deepseek-v2": 235_741,
    "deepseek-v2-lite": 15_706,
    "deepseek-v3": 671_026,
    "gpt-oss-120b": 116_829,
    "gpt-oss-20b": 20_915,
    "mixtral-8x22b": 140_621,
    "mixtral-8x7b": 46_703,
    "olmoe-1b-7b": 6_919,
    "phi-3.5-moe": 41_873,
    "qwen1.5-moe-a2.7b": 14_316,
    "qwen3-235b-a22b": 235_094,
    "qwen3-30b-a3b": 30_532,
    "tiny": 713,
}
SOUND = "source: test\nmodel_type: mixtral\nfields: {num_local_experts: 4}\n"


def written(folder: Path, text: str) -> Path:
    file = folder / "mine.yaml"
    file.write_text(text)
    return file


def test_every_preset_is_listed() -> None:
    assert preset_names() == sorted(MILLIONS)


@pytest.mark.parametrize("name", sorted(MILLIONS))
def test_a_preset_has_as_many_parameters_as_its_model(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_preset(name).config())
    assert round(model.num_parameters() / 1e6) == MILLIONS[name]


@pytest.mark.parametrize("name", sorted(MILLIONS))
def test_counts_can_be_changed_and_the_rest_stays(name: str) -> None:
    preset = load_preset(name)
    changed = preset.changed(num_layers=4, num_experts=16, top_k=4)
    assert (changed.num_layers, changed.num_experts, changed.top_k) == (4, 16, 4)
    assert changed.config().num_hidden_layers == 4
    assert changed.config().hidden_size == preset.config().hidden_size
    assert preset.changed() == preset


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="no model preset is called 'olmo-1b-7b', the nearest is "):
        load_preset("olmo-1b-7b")


def test_a_model_without_expert_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1 layers of deepseek-v2-lite hold no experts: .* 2 or"):
        load_preset("deepseek-v2-lite").changed(num_layers=1)


@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 8), (8, 0), (0, 1)])
def test_a_token_cannot_use_more_experts_than_there_are(num_experts: int, top_k: int) -> None:
    with pytest.raises(ValueError, match=f"cannot use {top_k} of {num_experts} experts of tiny"):
        load_preset("tiny").changed(num_experts=num_experts, top_k=top_k)


def test_a_file_outside_the_folder_is_read(tmp_path: Path) -> None:
    preset = read_preset(written(tmp_path, SOUND))
    assert (preset.name, preset.num_experts) == ("mine", 4)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (SOUND.replace("source", "sources"), "unknown key sources, the nearest is source"),
        (SOUND.replace("source: test\n", ""), "source is missing"),
        (SOUND.replace("mixtral", "mixtal"), "no model_type 'mixtal', the nearest is mixtral"),
        (SOUND.replace("num_local", "num_locl"), "fields.num_locl_experts, the nearest is num_lo"),
        (SOUND.replace("{num_local_experts: 4}", "4"), "fields must hold `name: value` lines"),
        ("source: [", "is not sound YAML"),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_preset(written(tmp_path, text))
    assert "mine.yaml" in str(caught.value)
    assert said in str(caught.value)
