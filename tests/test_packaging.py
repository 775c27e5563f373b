"""What is built from the checkout runs far from it, beside Hugging Face's package `kernels`."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import moe_runtime
from moe_runtime.kernels.cpu.gemv_status import ACTIVE
from moe_runtime.kernels.cpu.library import NOT_BUILT

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("kernels", "placement", "predictors")
HAS_COMPILER = shutil.which((sysconfig.get_config_var("CC") or "cc").split()[0]) is not None
NOT_SOURCES = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so", "*.o")


def run(*command: str | Path, cwd: Path, timeout: float = 240) -> str:
    """Run a command without stdin and without this process's PYTHONPATH; returns its output."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment | {"HF_HUB_OFFLINE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: a build leaves folders that the next one would pick up."""
    source = tmp_path_factory.mktemp("source") / "checkout"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("moe_runtime", "configs", *ROOMS):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=NOT_SOURCES)
    out = tmp_path_factory.mktemp("wheel")
    run(
        sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
        "--wheel-dir", out, source, cwd=source,
    )  # fmt: skip
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and Hugging Face's `kernels`, away from the checkout.

    torch and the rest are lent by this interpreter through a .pth file: the packages are the same
    as in a fresh install, and gigabytes are not copied. Links to the checkout are not followed
    there (a .pth file inside a lent folder is not read).
    """
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False, symlinks=True)
    pin = re.search(r"^kernels==.*$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert pin is not None
    run(
        sys.executable, "-m", "pip", "--python", home / "bin/python", "install", "--quiet",
        "--no-deps", wheel, pin.group(), cwd=home,
    )  # fmt: skip
    (site,) = home.glob("lib/python*/site-packages")
    lent = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "lent.pth").write_text("\n".join(lent) + "\n")
    return home


def files_below(folder: Path) -> set[str]:
    """What a build takes from the checkout: all but what an earlier build or run left there."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix not in (".so", ".o")
    }


def test_every_path_in_the_wheel_starts_with_moe_runtime(wheel: Path) -> None:
    paths = zipfile.ZipFile(wheel).namelist()
    assert [path for path in paths if not path.startswith("moe_runtime")] == []
    assert {path.split("/")[0] for path in paths} == {
        "moe_runtime",
        f"moe_runtime-{moe_runtime.__version__}.dist-info",
    }


def test_the_wheel_holds_each_file_of_the_library_once_and_nothing_else(wheel: Path) -> None:
    """Code, the demo with its checkpoint, configs, room READMEs, py.typed, the C library."""
    paths = [
        path.removeprefix("moe_runtime/")
        for path in zipfile.ZipFile(wheel).namelist()
        if path.startswith("moe_runtime/")
    ]
    expected = files_below(ROOT / "moe_runtime")
    for name in (*ROOMS, "configs"):
        expected |= {f"{name}/{path}" for path in files_below(ROOT / name)}
    if HAS_COMPILER:
        names = ("gemv", "experts", "unpack", "dequant", "quantise", "attention")
        expected |= {f"kernels/cpu/{name}_library.so" for name in names}
        expected |= {"placement/native/anneal_library.so"}
    assert sorted(paths) == sorted(expected)
    assert {"py.typed", "kernels/README.md", "configs/README.md"} <= set(paths)


def test_the_wheel_carries_the_readme_the_licence_and_the_command(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    info = f"moe_runtime-{moe_runtime.__version__}.dist-info"
    metadata = archive.read(f"{info}/METADATA").decode()
    assert (ROOT / "README.md").read_text().strip() in metadata
    assert "License-Expression: Apache-2.0" in metadata
    assert f"{info}/licenses/LICENSE" in archive.namelist()
    assert "moe-runtime = moe_runtime.cli.app:main" in archive.read(
        f"{info}/entry_points.txt"
    ).decode()  # fmt: skip


def test_the_installed_wheel_stands_beside_hugging_faces_kernels(
    installed: Path, tmp_path: Path
) -> None:
    """Neither package overwrites, hides or is taken for the other."""
    printed = run(
        installed / "bin/python", "-c",
        "import kernels, moe_runtime, moe_runtime.kernels;"
        "print(moe_runtime.__file__); print(kernels.__file__);"
        "print(*moe_runtime.kernels.__path__);"
        "print(kernels.get_kernel.__module__)",
        cwd=tmp_path,
    )  # fmt: skip
    ours, theirs, our_kernels, their_module = printed.splitlines()
    (site,) = installed.glob("lib/python*/site-packages")
    assert Path(ours) == site / "moe_runtime/__init__.py"
    assert Path(theirs) == site / "kernels/__init__.py"
    assert Path(our_kernels) == site / "moe_runtime/kernels"
    assert their_module.startswith("kernels.")


def test_the_installed_wheel_finds_its_compiled_libraries(installed: Path, tmp_path: Path) -> None:
    printed = run(
        installed / "bin/python", "-c",
        "from moe_runtime.kernels.cpu.gemv import CpuGemv;"
        "from moe_runtime.kernels.cpu.experts import CpuExperts;"
        "print(CpuGemv.status()); print(CpuGemv.load() is not None);"
        "print(CpuExperts.status())",
        cwd=tmp_path,
    )  # fmt: skip
    status, is_loaded, experts = printed.splitlines()
    assert is_loaded == str(status == ACTIVE)
    assert (status != NOT_BUILT) == HAS_COMPILER
    assert (experts != NOT_BUILT) == HAS_COMPILER  # both files name this reason alike


def test_the_installed_wheel_runs_the_demo(installed: Path, tmp_path: Path) -> None:
    run(installed / "bin/moe-runtime", "demo", "--max-new-tokens", "8", cwd=tmp_path)
    run(
        installed / "bin/python", "-m", "moe_runtime", "demo", "--max-new-tokens", "8", cwd=tmp_path
    )


@pytest.mark.parametrize("with_theirs", [False, True], ids=["alone", "beside-hf-kernels"])
def test_transformers_moe_classes_import_at_the_repository_root(
    with_theirs: bool, installed: Path
) -> None:
    """The folder `kernels` in the working directory must not be taken for the package `kernels`."""
    python = installed / "bin/python" if with_theirs else Path(sys.executable)
    printed = run(
        python, "-c",
        "import sys; sys.path.insert(0, '.');"
        "from transformers import MixtralForCausalLM, Qwen3MoeForCausalLM, DeepseekV3ForCausalLM;"
        "from transformers.integrations import hub_kernels, moe;"
        "print(MixtralForCausalLM.__name__)",
        cwd=ROOT,
    )  # fmt: skip
    assert printed.split() == ["MixtralForCausalLM"]


def test_the_doctor_asks_for_what_the_package_declares() -> None:
    """The least versions live in pyproject.toml; the doctor's table may not drift from them."""
    from moe_runtime.measure.software_checks import OPTIONAL, REQUIRED

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {}
    for requirement in project["dependencies"]:
        name, _, least = requirement.partition(";")[0].strip().partition(">=")
        declared[name] = least
    assert {name: declared.get(name) for name in REQUIRED} == REQUIRED
    bench = set(project["optional-dependencies"]["bench"])
    assert set(OPTIONAL) <= {*declared, *bench, "kernels"}


def test_every_tool_and_dependency_is_pinned() -> None:
    """constraints.txt names a version of all that an install with tests asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    pins = re.findall(r"^([\w.-]+)==\S+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    pinned = {normal(name) for name in pins}
    missing = {normal(re.split(r"[>;\s]", name)[0]) for name in asked} - pinned - {"pip"}
    assert missing == set()


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
