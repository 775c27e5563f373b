"""The cells in which predictions and plans meet the clock: what runs there, and how it is timed.

Cells and the grid of settings are those of docs/benchmarks/plan_cells.yaml.
"""

import json
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import yaml

import moe_runtime
from moe_runtime.integrations.transformers.spec_reader import spec_of_folder
from moe_runtime.measure.bench.presets import load_preset
from moe_runtime.measure.bench.random_checkpoint import write_random_checkpoint
from moe_runtime.measure.direct_read import FolderReads, open_folder
from moe_runtime.measure.operator_rate import operator_seconds
from moe_runtime.measure.probe.memory_rate import CpuMemoryRate
from moe_runtime.measure.routing_recorder import RoutingRecorder
from moe_runtime.perf.hardware import Hardware, ReadRate
from moe_runtime.perf.hardware_presets import load_hardware_preset
from moe_runtime.perf.hit_curve import HitCurve
from moe_runtime.perf.latency import LFU, LRU
from moe_runtime.perf.remedies import scaled_memory
from moe_runtime.simulate.hit_rates import hit_curve
from moe_runtime.trace import Phase, Trace
from moe_runtime.trace_writer import TraceWriter

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "moe_runtime" / "demo" / "mixtral-stdlib"
PLAN = yaml.safe_load((ROOT / "docs" / "benchmarks" / "plan_cells.yaml").read_text())
DEFAULTS = {name: values[0] for name, values in PLAN["grid"].items()}
WARM_STEPS = 8
MOST_OTHERS_CORES = 0.1  # that other programs keep busy while something is timed
# Tokens of the routing that hit rates come from are others than those that are timed, which are
# others in each run: a run's misses are chance, their median over runs is not.
TIMED_SEED, CURVE_SEED, CURVE_TEXTS = 1, 1001, 4
FIT_MODEL = "fit"
FIT_SHAPES = {
    "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 6, "num_local_experts": 16,
    "num_attention_heads": 8, "num_key_value_heads": 4,
}  # fmt: skip
_PAGE_BYTES = 4096
_FILE_BYTES = 32 * 2**20
_POOL_BYTES = 256 * 2**20
_DISK_DEPTH, _DISK_SECONDS = 2, 0.15
_DISK_STEPS = 8  # between two measurements
_REPEATS = 5


@dataclass(frozen=True)
class Cell:
    """What runs: `residency` in per cent."""

    model: str
    residency: int
    batch: int
    prompt_tokens: int

    @property
    def name(self) -> str:
        return f"{self.model} {self.residency}% batch {self.batch} prompt {self.prompt_tokens}"

    @classmethod
    def named(cls, name: str) -> "Cell":
        """The one whose `name` this is."""
        found = re.fullmatch(r"(\S+) (\d+)% batch (\d+) prompt (\d+)", name)
        assert found is not None, name
        return cls(found[1], *map(int, found.groups()[1:]))


def cells(model: str | None, residency: int | None, batch: int | None) -> list[Cell]:
    """Those that are asked for; the cheapest first, so that most are done when time is over."""
    found = []
    for entry, share, sequences, prompt in product(
        PLAN["models"], PLAN["residency"], PLAN["batch"], PLAN["prompt_tokens"]
    ):
        asked = ((model, entry["name"]), (residency, share), (batch, sequences))
        if all(wanted in (None, found) for wanted, found in asked):
            found.append(Cell(entry["name"], share, sequences, prompt))
    return sorted(found, key=lambda cell: cell.batch * cell.prompt_tokens)


def folder_of(model: str, work: Path) -> Path:
    """The bundled checkpoint, or a random one with the shapes of a preset, made once."""
    if model == FIT_MODEL:
        tiny = load_preset("tiny")
        small = replace(tiny, fields={**tiny.fields, **FIT_SHAPES})
        return write_random_checkpoint(small, work / FIT_MODEL)
    entry = next(entry for entry in PLAN["models"] if entry["name"] == model)
    if entry["preset"] is None:
        return DEMO
    preset = load_preset(entry["preset"])
    folder = work / f"{model}-{entry['num_layers']}-layers"
    return write_random_checkpoint(preset, folder, num_layers=entry["num_layers"])


def forced_tokens(folder: Path, cell: Cell, seed: int) -> torch.Tensor:
    """`[batch, prompt + new]` token ids, evenly drawn."""
    spec = spec_of_folder(folder)
    generator = torch.Generator().manual_seed(seed)
    shape = (cell.batch, cell.prompt_tokens + PLAN["new_tokens"])
    return torch.randint(spec.vocab_size, shape, generator=generator)


def load(folder: Path, cell: Cell, settings: dict[str, Any]) -> Any:
    """The model with these settings; threads are set where it runs."""
    options = {name: value for name, value in settings.items() if name != "threads"}
    return moe_runtime.load(folder, expert_memory=f"{cell.residency}%", warm_start=False, **options)


@torch.no_grad()
def decode(model: Any, tokens: torch.Tensor, cell: Cell) -> Iterator[float]:
    """Seconds of each step after the prompt."""
    output = model(input_ids=tokens[:, : cell.prompt_tokens], use_cache=True, logits_to_keep=1)
    for step in range(cell.prompt_tokens, tokens.shape[1]):
        start = time.perf_counter()
        output = model(
            input_ids=tokens[:, step : step + 1],
            past_key_values=output.past_key_values,
            use_cache=True,
        )
        yield time.perf_counter() - start


@dataclass(frozen=True)
class Timing:
    """Of one text: medians over the steps that count, and over what was measured between them."""

    tokens_per_second: float
    operator_nanoseconds: float
    disk_gbps: float | None


def time_text(
    model: Any,
    folder: Path,
    cell: Cell,
    threads: int,
    seed: int,
    disk_gbps: Callable[[], float] | None = None,
) -> Timing:
    """Processor and disk change their pace within seconds, so it is taken between steps.

    Reads leave caches cold and threads asleep: the step behind them does not count.
    """
    torch.set_num_threads(threads)
    steps, operators, rates = [], [], []
    counts = False
    for number, seconds in enumerate(decode(model, forced_tokens(folder, cell, seed), cell), 1):
        if counts:
            steps.append(seconds)
            operators.append(operator_seconds(repeats=1))
        counts = number >= WARM_STEPS
        if disk_gbps is not None and number % _DISK_STEPS == 0:
            rates.append(disk_gbps())
            counts = False
    return Timing(
        tokens_per_second=cell.batch / statistics.median(steps),
        operator_nanoseconds=1e9 * statistics.median(operators),
        disk_gbps=statistics.median(rates) if rates else None,
    )


def curves_of(folder: Path, cell: Cell, work: Path) -> dict[str, HitCurve]:
    """By policy, simulated once on the routing of other texts: as many, behind as long a prompt."""
    path = work / f"curves-{cell.model}-{cell.batch}-{cell.prompt_tokens}.json"
    if not path.is_file():
        decoded = routing_of(folder, cell, work)
        curves = {
            policy: hit_curve(decoded, policy=policy, batch=cell.batch, is_own=True)
            for policy in (LRU, LFU)
        }
        path.write_text(json.dumps({policy: asdict(curve) for policy, curve in curves.items()}))
    found = json.loads(path.read_text())
    return {policy: HitCurve(**fields) for policy, fields in found.items()}


def routing_of(folder: Path, cell: Cell, work: Path) -> Trace:
    """Of decode steps of other texts than those that are timed."""
    path = work / f"routing-{cell.model}-{cell.batch}-{cell.prompt_tokens}.npz"
    if not path.is_file():
        model = moe_runtime.load(folder, warm_start=False)
        writer = TraceWriter(path)
        with closing(moe_runtime.handle(model)), RoutingRecorder(model, writer, name=cell.model):
            for text in range(CURVE_TEXTS):
                for _ in decode(model, forced_tokens(folder, cell, CURVE_SEED + text), cell):
                    pass
        writer.close()
    trace = Trace.load(path)
    return trace.select((trace.phase == Phase.DECODE).nonzero()[0])


class Surroundings:
    """What memory and disk do around a run and in it. What they read is made once."""

    def __init__(self, memory: CpuMemoryRate, disk: FolderReads, block_bytes: int) -> None:
        self._memory, self._disk, self._block_bytes = memory, disk, block_bytes

    @classmethod
    @contextmanager
    def of(cls, folder: Path) -> Iterator["Surroundings"]:
        pages = spec_of_folder(folder).expert_bytes // _PAGE_BYTES
        with ExitStack() as stack:
            memory = CpuMemoryRate(num_threads=torch.get_num_threads(), num_bytes=_POOL_BYTES)
            reads = open_folder(folder, least_bytes=_FILE_BYTES, scratch_bytes=_FILE_BYTES)
            yield cls(stack.enter_context(memory), stack.enter_context(reads), pages * _PAGE_BYTES)

    def memory_gbps(self) -> float:
        return statistics.median(self._memory.read_gbps() for _ in range(_REPEATS))

    def disk_gbps(self) -> float:
        """In blocks of an expert."""
        return self._disk.reads.rate_gbps(
            block_bytes=self._block_bytes, num_threads=_DISK_DEPTH, seconds=_DISK_SECONDS
        )


def machine_of(run: dict[str, Any], read_bytes: int) -> Hardware:
    """The probed file of this machine, at the rates around a run and between its steps."""
    base = load_hardware_preset("2-core-epyc")
    assert base.disk is not None
    rate = ReadRate(block_bytes=read_bytes, depth=_DISK_DEPTH, gbps=run["disk_gbps"])
    return replace(
        scaled_memory(base, statistics.mean(run["memory_gbps"]) / base.memory.read_gbps),
        cpu=replace(base.cpu, operator_nanoseconds=run["operator_nanoseconds"]),
        disk=replace(base.disk, reads=(rate,)),
    )


def read(results: Path) -> list[dict[str, Any]]:
    """All lines that are whole: the last one may have been cut short."""
    if not results.is_file():
        return []
    found = []
    for line in results.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def append(results: Path, found: dict[str, Any]) -> None:
    with results.open("a") as file:
        file.write(json.dumps(found) + "\n")
