"""The rooms stand at the top of the repository and are installed under one roof, `moe_runtime`."""

from setuptools import find_namespace_packages, setup

ROOMS = ("kernels", "placement", "predictors")
LINKS = (*ROOMS, "configs")  # moe_runtime/<name> -> ../<name>, for the checkout only
DATA_ONLY = ("demo",)
NEVER = ["__pycache__", "*.__pycache__", "*.__pycache__.*"]


def _package_dir() -> dict[str, str]:
    """Map every import name to the folder that holds it, without walking through the links."""
    outside = [f"moe_runtime.{name}{tail}" for name in (*LINKS, *DATA_ONLY) for tail in ("", ".*")]
    core = find_namespace_packages(
        include=["moe_runtime", "moe_runtime.*"], exclude=[*outside, *NEVER]
    )
    folders = {name: name.replace(".", "/") for name in core}
    for room in ROOMS:
        for sub in ("", *find_namespace_packages(room, exclude=NEVER)):
            name = f"{room}.{sub}" if sub else room
            folders[f"moe_runtime.{name}"] = name.replace(".", "/")
    folders["moe_runtime.configs"] = "configs"
    return folders


PACKAGE_DIR = _package_dir()

setup(
    packages=list(PACKAGE_DIR),
    package_dir=PACKAGE_DIR,
    package_data={
        "moe_runtime": ["py.typed", "demo/**/*"],
        "moe_runtime.configs": ["**/*"],
        **{f"moe_runtime.{room}": ["README.md"] for room in ROOMS},
    },
    exclude_package_data={"": ["__pycache__/*", "*.pyc"]},
    include_package_data=False,
)
