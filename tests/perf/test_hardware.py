"""A hardware file holds what was measured, and a figure that cannot be is refused by name."""

from dataclasses import fields, is_dataclass
from datetime import date
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.config import Plausible
from moe_runtime.errors import ConfigError
from moe_runtime.perf.hardware import Disk, Gpu, Hardware, ReadRate, Software

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "configs" / "hardware").glob("*.yaml"))

SOUND = """
source: measured
measured_on: 2026-11-23
software: {operating_system: Linux, python: 3.11.7, torch: 2.13.0, moe_runtime: 0.1.0, others_cores: 0}
cpu: {model: EPYC, physical_cores: 2, threads: 2, isa: [avx2]}
memory:
  total_bytes: 25000000000
  available_bytes: 20000000000
  read_gbps: 45.2
  read_gbps_quartiles: [40, 50]
  copy_gbps: 15
matmul:
  weight_shape: [2048, 2048]
  rates:
  - {dtype: bfloat16, kernel: torch, rows: 1, weights_gbps: 15, gflops: 15, share_of_read: 0.4}
disk:
  file_system: ext4
  direct: true
  read_from: model.safetensors
  reads:
  - {block_bytes: 131072, depth: 1, gbps: 0.2}
  - {block_bytes: 4194304, depth: 2, gbps: 1.1, gbps_quartiles: [1.0, 1.2]}
gpus:
- name: H100
  memory_bytes: 80000000000
  compute_capability: "9.0"
  pinned_to_gpu_gbps: 54
"""  # noqa: E501 - one line of YAML


def read(tmp_path: Path, text: str) -> Hardware:
    path = tmp_path / "machine.yaml"
    path.write_text(text)
    return Hardware.load(path)


def refusal(tmp_path: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    return str(caught.value)


def test_a_cost_model_finds_what_it_needs(tmp_path: Path) -> None:
    hardware = read(tmp_path, SOUND)
    assert hardware.memory.read_gbps == 45.2
    assert hardware.disk is not None
    assert hardware.disk.best == ReadRate(
        block_bytes=4 * 2**20, depth=2, gbps=1.1, gbps_quartiles=(1.0, 1.2)
    )
    assert hardware.matmul is not None
    assert hardware.matmul.rates[0].weights_gbps == 15
    assert hardware.gpus[0].pinned_to_gpu_gbps == 54
    assert hardware.gpus[0].memory_read_gbps is None


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("read_gbps: 45.2", "read_gbps: 0.0",
         "memory.read_gbps (0.0) is outside 0.1 to 20000 GB/s; measure again with moe-runtime "
         "probe"),
        ("gbps: 0.2", "gbps: 2000000", "disk.reads[0].gbps (2000000.0) is outside 0.0001 to 1000 "
         "GB/s"),
        ("pinned_to_gpu_gbps: 54", "pinned_to_gpu_gbps: 54e9", "must be a number"),
        ("[40, 50]", "[46, 50]", "memory.read_gbps (45.2) is outside its quartiles (46.0 to 50.0)"),
        ("[1.0, 1.2]", "[1.2, 1.0]", "disk.reads[1].gbps (1.1) is outside its quartiles"),
        ("pinned_to_gpu_gbps: 54", "gpu_to_pinned_gbps_quartiles: [1, 2]",
         "gpus[0].gpu_to_pinned_gbps (None) is outside its quartiles"),
        ("copy_gbps", "copy_gpbs", "unknown key memory.copy_gpbs, the nearest is copy_gbps"),
        ("measured_on: 2026-11-23", "", "source is measured, so measured_on"),
        ("source: measured", "source: datasheet", "source is datasheet, so its url"),
        ("source: measured", "source: hearsay", "must be one of measured, datasheet"),
        ("bfloat16", "int8", "matmul.rates[0].dtype ('int8') must be one of float32"),
        ("physical_cores: 2", "physical_cores: 0", "cpu.physical_cores (0) is outside 1 to"),
    ],
)  # fmt: skip
def test_a_figure_that_cannot_be_is_named_with_its_range(
    tmp_path: Path, old: str, new: str, said: str
) -> None:
    assert old in SOUND
    sentence = refusal(tmp_path, SOUND.replace(old, new))
    assert said in sentence
    assert sentence.endswith("; measure again with moe-runtime probe")


def test_a_disk_without_rates_is_refused(tmp_path: Path) -> None:
    start = SOUND.index("  reads:")
    text = SOUND[:start] + "  reads: []\n" + SOUND[SOUND.index("gpus:") :]
    assert "disk.reads is empty" in refusal(tmp_path, text)


def test_a_datasheet_needs_no_quartiles_but_its_address(tmp_path: Path) -> None:
    text = """
source: datasheet
url: https://example.org/cpu
cpu: {model: EPYC, physical_cores: 2, threads: 2, isa: []}
memory: {total_bytes: 1000000, available_bytes: 1000000, read_gbps: 460, copy_gbps: 230}
gpus: []
"""
    hardware = read(tmp_path, text)
    assert hardware.disk is None
    assert hardware.memory.read_gbps_quartiles is None


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Anything that a field of this type may hold."""
    arguments = get_args(hint)
    if get_origin(hint) is Annotated:
        limits = arguments[1]
        assert isinstance(limits, Plausible)
        if arguments[0] is int:
            return st.integers(int(limits.low), int(limits.high))
        return st.floats(limits.low, limits.high)
    if get_origin(hint) in (UnionType, Union):
        return st.none() | values(next(kind for kind in arguments if kind is not NoneType))
    if get_origin(hint) is Literal:
        return st.sampled_from(arguments)
    if get_origin(hint) is tuple:
        if arguments[-1] is Ellipsis:
            return st.lists(values(arguments[0]), min_size=1, max_size=3).map(tuple)
        return st.tuples(*(values(argument) for argument in arguments))
    if is_dataclass(hint):
        return objects(hint)
    return {str: st.text(), bool: st.booleans(), date: st.dates()}[hint]


def objects(kind: Any) -> st.SearchStrategy[Any]:
    """Any sound object of this dataclass: quartiles lie around their median."""
    hints = get_type_hints(kind, include_extras=True)
    chosen = st.fixed_dictionaries(
        {field.name: values(hints[field.name]) for field in fields(kind)}
    )

    def build(parts: dict[str, Any]) -> Any:
        for name in [name for name in parts if name.endswith("_quartiles")]:
            middle = parts[name.removesuffix("_quartiles")]
            if parts[name] is not None:
                ends = None if middle is None else sorted((*parts[name], middle))
                parts[name] = None if ends is None else (ends[0], ends[2])
        if kind is Hardware:
            parts["source"] = "measured" if parts["url"] is None else "datasheet"
            if parts["source"] == "measured":
                for name in ("measured_on", "software"):
                    parts[name] = parts[name] if parts[name] is not None else EXAMPLES[name]
        return kind(**parts)

    return chosen.map(build)


EXAMPLES: dict[str, Any] = {
    "measured_on": date(2026, 1, 31),
    "software": Software(
        operating_system="Linux", python="3", torch="2", moe_runtime="0", others_cores=0.0
    ),
}


@given(hardware=st.deferred(lambda: objects(Hardware)))
def test_what_is_saved_is_loaded_as_the_same_object(
    hardware: Hardware, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("saved") / "machine.yaml"
    hardware.save(path)
    assert Hardware.load(path) == hardware


def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    sound = read(tmp_path, SOUND)
    broken = Hardware(
        **{field.name: getattr(sound, field.name) for field in fields(Hardware)}
        | {
            "disk": Disk(
                file_system="ext4",
                direct=True,
                read_from="x",
                reads=(ReadRate(block_bytes=1, depth=1, gbps=0.0),),
            )
        }
    )
    with pytest.raises(ConfigError, match=r"disk\.reads\[0\]\.gbps \(0\.0\) is outside"):
        broken.save(tmp_path / "broken.yaml")
    assert not (tmp_path / "broken.yaml").exists()


def test_every_rate_of_a_gpu_may_be_absent() -> None:
    """What was not measured is left out; nothing stands in for it."""
    rates = [field for field in fields(Gpu) if "gbps" in field.name]
    assert rates
    assert all(field.default is None for field in rates)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_files_of_the_house_load(path: Path) -> None:
    hardware = Hardware.load(path)
    assert hardware.memory.read_gbps > 0
