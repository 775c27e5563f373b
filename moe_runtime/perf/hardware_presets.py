"""The machines that `configs/hardware/` holds, by name."""

from pathlib import Path

from moe_runtime.model_preset import nearest
from moe_runtime.perf.hardware import Hardware

_FOLDER = Path(__file__).resolve().parents[1] / "configs" / "hardware"


def hardware_preset_names() -> list[str]:
    """All of them, sorted."""
    return sorted(file.stem for file in _FOLDER.glob("*.yaml"))


def load_hardware_preset(name: str) -> Hardware:
    """The machine called `name`. Raises ValueError, naming the nearest, when there is none."""
    names = hardware_preset_names()
    if name not in names:
        raise ValueError(
            f"no hardware preset is called {name!r}{nearest(name, names)}; there are "
            f"{', '.join(names)}; or give a file that moe-runtime probe -o has written"
        )
    return Hardware.load(_FOLDER / f"{name}.yaml")


def preset_of_gpu(gpu_name: str) -> str | None:
    """The preset whose GPU the driver calls so, or None."""
    for name in hardware_preset_names():
        if any(gpu.name == gpu_name for gpu in load_hardware_preset(name).gpus):
            return name
    return None
