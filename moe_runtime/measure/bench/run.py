"""One offload benchmark from the words of its command to its report."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moe_runtime.integrations.transformers.device import single_device
from moe_runtime.integrations.transformers.resolve import resolve_model
from moe_runtime.measure.bench.machine import describe_machine, describe_versions, git_commit
from moe_runtime.measure.bench.model import make_checkpoint, make_gguf
from moe_runtime.measure.bench.offload_benchmark import describe_model, run_offload_benchmark
from moe_runtime.measure.bench.report import Report
from moe_runtime.measure.bench.routing import read_routings
from moe_runtime.measure.bench.settings import Progress, Settings
from moe_runtime.measure.peers.catalog import choose_peers

_RESIDENCIES = {"cpu": (1.0, 0.65, 0.35), "cuda": (1.0, 0.5, 0.25, 0.125)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What was asked for. `model` is a checkpoint; without one, one is made with shapes `like`.

    `device` None is a GPU if there is one; `residencies` None are those that suit the device."""

    command: str
    device: str | None = None
    like: str
    num_layers: int | None
    model: str | None
    residencies: tuple[float, ...] | None
    routing: str
    peers: str
    equal_totals: bool
    policy: str
    predictor: str = "off"
    exact: bool = False
    num_steps: int
    seconds: float
    work_folder: Path


def run(request: Request, progress: Progress, on_bytes: Callable[[str, int, int], None]) -> Report:
    """Make what files are missing and measure; `on_bytes` hears what is written, done and total.

    What is wrong with the request raises before anything is written.
    """
    device = single_device(request.device)
    peers = choose_peers(request.peers, device.type)
    routings = read_routings(request.routing)
    try:
        request.work_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"work folder {request.work_folder} cannot be made: {error.strerror}; name another"
        ) from error
    remark = ""
    if request.model is not None:
        checkpoint = resolve_model(request.model).folder
    else:
        checkpoint, remark = make_checkpoint(
            request.like,
            request.work_folder,
            num_layers=request.num_layers,
            routings=routings,
            on_progress=lambda done, total: on_bytes("checkpoint", done, total),
        )
    gguf, no_gguf = make_gguf(
        checkpoint,
        request.work_folder,
        peers,
        lambda done, total: on_bytes("GGUF", done, total),
    )
    settings = Settings(
        device=device,
        checkpoint=checkpoint,
        gguf=gguf,
        no_gguf=no_gguf,
        work_folder=request.work_folder,
        residencies=request.residencies or _RESIDENCIES[device.type],
        routings=routings,
        peers=peers,
        num_steps=request.num_steps,
        seconds=request.seconds,
        equal_totals=request.equal_totals,
        policy=request.policy,
        predictor=request.predictor,
        exact=request.exact,
    )
    tables, comparisons = run_offload_benchmark(settings, progress)
    return Report(
        command=request.command,
        machine=describe_machine(checkpoint, device),
        versions=describe_versions(),
        commit=git_commit(),
        model={**describe_model(checkpoint), "remark": remark},
        tables=tables,
        comparisons=comparisons,
    )
