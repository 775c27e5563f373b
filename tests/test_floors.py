"""The dependency law: a file imports its own room and what stands below it, and nothing else."""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "moe_runtime"
ROOMS = ("kernels", "placement", "predictors")  # folders at the top, linked under moe_runtime
LINKS = (*ROOMS, "configs")
FACADE = ("__init__", "__main__")


@dataclass(frozen=True)
class Room:
    """A folder of moe_runtime, or a group of files beside each other in it."""

    floor: float
    members: frozenset[str]
    may_import: frozenset[str]
    third_parties: frozenset[str]
    lazy_third_parties: frozenset[str] = field(default_factory=frozenset)


def names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# The nouns everyone shares stand on floor 0; wiring files stand on floor 4.
NOUNS = names(
    "expert expert_memory trace trace_csv trace_fields trace_file trace_split trace_writer "
    "placement_map model_preset model_spec config errors"
)
BELOW_3 = NOUNS | names("perf kernels predictors placement memory cache")
BELOW_4 = BELOW_3 | names("simulate scheduling parallel recording")
WIRING = names(
    "layer fast_layer engine foresight warm_start offline kernel_settings grouped_experts "
    "stored_weights torch_rows tiered_access tiered_ahead tiered_engine tiered_layer tiered_math"
)
BELOW_5 = BELOW_4 | WIRING
BELOW_6 = BELOW_5 | names("integrations measure report")
# The names of foreign runtimes and model formats: floor 5 is where they may be known.
FOREIGN = names(
    "accelerate deepspeed gguf huggingface_hub llama_cpp megatron moe_policylang sglang "
    "tensorrt_llm tokenizers transformers vllm"
)

LAW = {
    "nouns": Room(0, NOUNS, NOUNS, names("numpy yaml")),
    "perf": Room(1, names("perf"), NOUNS, names("numpy scipy"), names("pulp highspy")),
    "kernels": Room(1, names("kernels"), names(""), names("torch triton"), names("triton")),
    "predictors": Room(2, names("predictors"), NOUNS, names("numpy torch safetensors")),
    # Never torch: a placement is solved where there is none.
    "placement": Room(
        2, names("placement"), NOUNS | {"perf"}, names("numpy scipy"), names("pulp highspy")
    ),
    "memory": Room(2, names("memory"), NOUNS | {"kernels"}, names("numpy torch psutil")),
    "cache": Room(2, names("cache"), NOUNS, names("numpy")),
    "scheduling": Room(3, names("scheduling"), BELOW_3, names("numpy torch")),
    # Half a floor up: what is simulated are the very decisions that scheduling takes.
    "simulate": Room(3.5, names("simulate"), BELOW_3 | {"scheduling"}, names("numpy torch")),
    # Told by engines what happens; they know it as a protocol alone.
    "recording": Room(3, names("recording"), BELOW_3, names("numpy torch")),
    "parallel": Room(3, names("parallel"), BELOW_3, names("numpy torch")),
    "wiring": Room(4, WIRING, BELOW_5, names("numpy torch")),
    "integrations": Room(
        5,
        names("integrations"),
        BELOW_5,
        FOREIGN | names("numpy torch safetensors yaml"),
        # A dump may be torch's; files that are text must not wait for torch.
        FOREIGN | names("torch"),
    ),
    "measure": Room(
        5,
        names("measure"),
        BELOW_5 | {"integrations"},
        FOREIGN | names("numpy torch safetensors psutil"),
        # The doctor must live where torch is broken; a child process counts its imports' memory.
        FOREIGN | names("torch safetensors pynvml"),
    ),
    "report": Room(5, names("report"), BELOW_5, names("numpy"), names("matplotlib")),
    "cli": Room(6, names("cli"), BELOW_6, names("typer rich")),
}
LAZY_ROOMS = names("cli")  # a command imports what it needs when it runs
PLATFORM_MODULES = names("resource")  # in the standard library, but not of every system


@dataclass(frozen=True)
class Import:
    """One imported module as written, made absolute."""

    module: str
    line: int
    is_lazy: bool
    is_for_types: bool


def source_files() -> list[Path]:
    """Every Python file of the library, rooms by way of their links, as paths below PACKAGE."""
    # rglob does not walk through links, so the rooms are listed by their own folders.
    own = {path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")}
    linked = {path.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    found = {path for path in own if path.parts[0] not in LINKS} | linked
    return sorted(path for path in found if path.parts[0] != "demo")


SOURCES = source_files()


def dotted(path: Path) -> str:
    parts = ("moe_runtime", *path.with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(member: str) -> str:
    """The room that holds moe_runtime.<member>."""
    for name, room in LAW.items():
        if member in room.members:
            return name
    pytest.fail(f"moe_runtime.{member} has no floor: give it one in LAW and in design/house.md")


def exists(module: str) -> bool:
    """Whether `module` is a file or a folder of ours."""
    path = PACKAGE.joinpath(*module.split(".")[1:])
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports_of(path: Path) -> Iterator[Import]:
    """All imports of a file; `from package import submodule` counts as the submodule."""
    own = dotted(path)
    tree = ast.parse((PACKAGE / path).read_text(), filename=str(path))
    yield from walk(tree, own, is_lazy=False, is_for_types=False)


def walk(node: ast.AST, own: str, *, is_lazy: bool, is_for_types: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        lazy = is_lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for_types = is_for_types or (
            isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        )
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, is_lazy, is_for_types)
        elif isinstance(child, ast.ImportFrom):
            base = child.module or ""
            if child.level:
                parent = own.split(".")[: -child.level]
                base = ".".join([*parent, base] if base else parent)
            for alias in child.names:
                inner = f"{base}.{alias.name}"
                is_submodule = base.split(".")[0] == "moe_runtime" and exists(inner)
                yield Import(inner if is_submodule else base, child.lineno, is_lazy, is_for_types)
        else:
            yield from walk(child, own, is_lazy=lazy, is_for_types=for_types)


def test_there_is_something_to_check() -> None:
    assert Path("errors.py") in SOURCES


@pytest.mark.parametrize("path", [p for p in SOURCES if p.stem not in FACADE], ids=str)
def test_a_file_imports_only_its_room_and_what_stands_below(path: Path) -> None:
    room = LAW[room_of(path.with_suffix("").parts[0])]
    broken = []
    for found in imports_of(path):
        top, _, rest = found.module.partition(".")
        if top == "moe_runtime":
            member = rest.split(".")[0]
            # The package itself holds the version; its other names are for users.
            allowed = not member or member in room.members | room.may_import
        elif top in sys.stdlib_module_names:
            allowed = True
        else:
            allowed = top in room.third_parties | room.lazy_third_parties
        if not allowed:
            broken.append(f"{path}:{found.line} imports {found.module}")
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("path", [p for p in SOURCES if p.stem not in FACADE], ids=str)
def test_only_optional_packages_and_commands_are_imported_inside_functions(path: Path) -> None:
    name = room_of(path.with_suffix("").parts[0])
    if name in LAZY_ROOMS:
        return
    broken = [
        f"{path}:{found.line} imports {found.module} inside a function"
        for found in imports_of(path)
        if found.is_lazy
        and found.module.split(".")[0] not in LAW[name].lazy_third_parties | PLATFORM_MODULES
    ]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_nothing_of_ours_is_taken_from_the_facade(path: Path) -> None:
    """The public names of the package lead upwards: inside, each noun is imported from its file."""
    tree = ast.parse((PACKAGE / path).read_text())
    taken = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "moe_runtime" and not node.level
        for alias in node.names
        if not exists(f"moe_runtime.{alias.name}")
    }
    assert taken <= {"__version__"}


def test_the_facade_imports_nothing_of_ours_and_nothing_heavy() -> None:
    for found in imports_of(Path("__init__.py")):
        assert found.is_for_types or found.module.split(".")[0] in sys.stdlib_module_names


def test_no_two_files_import_each_other() -> None:
    known = {dotted(path): path for path in SOURCES}
    graph = {
        module: {
            found.module
            for found in imports_of(path)
            if found.module in known and found.module != module and not found.is_for_types
        }
        for module, path in known.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def test_the_law_itself_points_down() -> None:
    for name, room in LAW.items():
        for member in room.may_import - room.members:
            below = LAW[room_of(member)]
            within_floor_5 = (name, member) == ("measure", "integrations")
            assert below.floor < room.floor or within_floor_5, f"{name} may import {member}"


@pytest.mark.parametrize("name", LINKS)
def test_the_rooms_stand_at_the_top_and_are_linked(name: str) -> None:
    link = PACKAGE / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name
    assert (ROOT / name / "README.md").is_file()


@pytest.mark.parametrize("name", LINKS)
def test_no_room_is_a_regular_package(name: str) -> None:
    """An `__init__.py` would let the folder be taken for Hugging Face's `kernels`."""
    assert not list((ROOT / name).rglob("__init__.py"))
