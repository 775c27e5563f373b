"""The rooms stand at the top of the repository and are installed under one roof, `moe_runtime`."""

from pathlib import Path

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
COMPILE = ["-std=c11", "-g0", "-fvisibility=hidden"]
# Room, folder in it, name, flags. Loops over elements become vectors at -O3 only, and where a
# comparison may be computed for all lanes; no result depends on either.
C_SOURCES = (
    ("kernels", "cpu", "gemv", ["-O2"]),
    ("kernels", "cpu", "experts", ["-O3", "-fno-trapping-math"]),
    ("kernels", "cpu", "quantise", ["-O3", "-fno-trapping-math"]),
    ("kernels", "cpu", "unpack", ["-O2"]),
    ("kernels", "cpu", "dequant", ["-O2"]),
    (
        "kernels",
        "cpu",
        "attention",
        ["-O2", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi"],
    ),
    ("placement", "native", "anneal", ["-O3"]),
)
LIBRARIES = [
    Extension(
        f"moe_runtime.{room}.{folder}.{name}_library",
        [f"{room}/{folder}/{name}.c"],
        depends=["setup.py", *map(str, sorted(Path(room, folder).glob("*.h")))],
        extra_compile_args=[*COMPILE, *flags],
        optional=True,  # without a compiler torch or numpy computes, and `doctor` says so
    )
    for room, folder, name, flags in C_SOURCES
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
        **{f"moe_runtime.{room}.{folder}": ["*.c", "*.h"] for room, folder, _, _ in C_SOURCES},
    },
    exclude_package_data={"": ["__pycache__/*", "*.pyc"]},
    include_package_data=False,
)
