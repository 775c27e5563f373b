"""The rooms stand at the top of the repository and are installed under one roof, `moe_runtime`."""

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext

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


class BuildLibraries(build_ext):
    """Builds C libraries for ctypes: no module of Python's, so no Python version in their names."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []


PACKAGE_DIR = _package_dir()
LIBRARIES = [
    Extension(
        f"moe_runtime.kernels.cpu.{name}_library",
        [f"kernels/cpu/{name}.c"],
        depends=["setup.py", *headers],
        extra_compile_args=["-std=c11", "-O2", "-g0", "-fvisibility=hidden"],
        optional=True,  # without a compiler torch computes, and `moe-runtime doctor` says so
    ),
    Extension(
        "moe_runtime.placement.native.anneal_library",
        ["placement/native/anneal.c"],
        depends=["setup.py"],
        extra_compile_args=["-std=c11", "-O3", "-g0", "-fvisibility=hidden"],
        optional=True,  # without a compiler numpy anneals, and the result says so
    ),
    )
    for name, headers in (("gemv", []), ("unpack", ["kernels/cpu/packed_row.h"]))
]

setup(
    packages=list(PACKAGE_DIR),
    package_dir=PACKAGE_DIR,
    ext_modules=LIBRARIES,
    cmdclass={"build_ext": BuildLibraries},
    package_data={
        "moe_runtime": ["py.typed", "demo/**/*"],
        "moe_runtime.configs": ["**/*"],
        **{f"moe_runtime.{room}": ["README.md"] for room in ROOMS},
        "moe_runtime.kernels.cpu": ["*.c"],
        "moe_runtime.placement.native": ["*.c"],
        "moe_runtime.kernels.cpu": ["*.c", "*.h"],
    },
    exclude_package_data={"": ["__pycache__/*", "*.pyc"]},
    include_package_data=False,
)
