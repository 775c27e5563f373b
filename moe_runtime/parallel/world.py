"""The processes that run one model together, and how they meet and part."""

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from moe_runtime.errors import ParallelError
from moe_runtime.parallel.ledger import Ledger

TIMEOUT_SECONDS = 300.0
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_REMEDY = "start it with torchrun --nproc-per-node N -m moe_runtime ..."


def started_ranks() -> int | None:
    """The WORLD_SIZE that torchrun has set, or None where it has not started this process."""
    size = os.environ.get("WORLD_SIZE", "")
    return int(size) if size.isdigit() and "RANK" in os.environ else None


def own_device(device: torch.device) -> torch.device:
    """Of `cuda` without a number, the GPU that torchrun means for this process."""
    local_rank = os.environ.get("LOCAL_RANK", "")
    has_number = str(device) != device.type
    if device.type == "cpu" or has_number or not local_rank.isdigit():
        return device
    return torch.device(device.type, int(local_rank))


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """One rank's place among the processes of a group; `close` leaves it."""

    ledger: Ledger
    hosts: tuple[str, ...]  # by rank
    is_ours: bool  # whether the process group was made here, and ends here

    @classmethod
    def join(
        cls,
        mesh: Any = None,
        *,
        device: torch.device | str = "cpu",
        timeout_seconds: float | None = None,
    ) -> "World":
        """Of the ranks of a one-dimensional DeviceMesh, or of all that torchrun has started.

        A process group that exists is used with the time-out it has; otherwise one is made. Raises
        ParallelError.
        """
        if not distributed.is_available():
            raise ParallelError("this torch was built without torch.distributed; install another")
        device = torch.device(device)
        has_group = distributed.is_initialized()
        if mesh is not None and mesh.ndim != 1:
            raise ParallelError(
                f"the mesh has {mesh.ndim} dimensions ({mesh.mesh_dim_names}); give the one of "
                'expert parallelism, such as mesh["ep"]'
            )
        if timeout_seconds is not None and (has_group or mesh is not None):
            raise ParallelError(
                f"timeout_seconds ({timeout_seconds:g}) has no effect on a process group that "
                "exists; leave it out, and give init_process_group() its timeout"
            )
        if mesh is None and not has_group:
            timeout_seconds = TIMEOUT_SECONDS if timeout_seconds is None else timeout_seconds
            _make_group(device, timeout_seconds)
        group = distributed.group.WORLD if mesh is None else mesh.get_group()
        try:
            _check_backend(group, device)
            ledger = Ledger(group, device=device, timeout_seconds=timeout_seconds)
            hosts = tuple(ledger.gather_texts(socket.gethostname()))
        except BaseException:
            if not has_group:
                distributed.destroy_process_group()
            raise
        ledger.num_nodes = _num_nodes(hosts)
        return cls(ledger=ledger, hosts=hosts, is_ours=not has_group and mesh is None)

    @property
    def rank(self) -> int:
        return self.ledger.rank

    @property
    def num_ranks(self) -> int:
        return self.ledger.num_ranks

    @property
    def num_neighbours(self) -> int:
        """Ranks on this machine, this one included: they share its memory."""
        return self.hosts.count(self.hosts[self.rank])

    def close(self, *, orderly: bool) -> None:
        """End the group if it was made here; `orderly` if all ranks come here, and are awaited.

        Otherwise its connections break, which ends the ranks that still wait for this one.
        """
        if self.is_ours and distributed.is_initialized():
            try:
                if orderly:
                    self.ledger.barrier()
            finally:
                distributed.destroy_process_group()


def check_agreement(ledger: Ledger, facts: dict[str, str]) -> None:
    """Raise ParallelError on every rank if `facts` are not the same on all; collective.

    The first fact that differs is named, with its values and their ranks.
    """
    lines = "\n".join(f"{name}={value}" for name, value in facts.items())
    by_rank = [
        dict(line.split("=", 1) for line in t.split("\n")) for t in ledger.gather_texts(lines)
    ]
    for name in by_rank[0]:
        values: dict[str | None, list[int]] = {}
        for rank, found in enumerate(by_rank):
            values.setdefault(found.get(name), []).append(rank)
        if len(values) > 1:
            said = ", ".join(f"{value!r:.60} on {_ranks(ranks)}" for value, ranks in values.items())
            raise ParallelError(
                f"ranks disagree on the {name}: {said}; start all of them with the same "
                "files, versions and options"
            )


def _ranks(ranks: list[int]) -> str:
    word = "rank" if len(ranks) == 1 else "ranks"
    more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
    return f"{word} {', '.join(map(str, ranks[:4]))}{more}"


def _make_group(device: torch.device, timeout_seconds: float) -> None:
    if timeout_seconds <= 0:
        raise ParallelError(f"the time-out is {timeout_seconds:g} s; it must be above 0")
    missing = [name for name in _VARIABLES if not os.environ.get(name)]
    if missing:
        raise ParallelError(
            f"expert parallelism needs {', '.join(missing)} in the environment, which torchrun "
            f"sets; {_REMEDY}"
        )
    backend = "gloo" if device.type == "cpu" else "nccl"
    try:
        distributed.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        first = str(error).strip().splitlines()[0]
        raise ParallelError(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} cannot meet the others at "
            f"{where} within {timeout_seconds:g} s ({first}); check that all ranks are started, "
            "that the address is right and that the port is free"
        ) from error


def _check_backend(group: Any, device: torch.device) -> None:
    backend = distributed.get_backend(group)
    if backend == "nccl" and device.type == "cpu":
        raise ParallelError(
            "the process group is of NCCL, which moves tensors of GPUs, and the model is on the "
            'CPU; make the group with backend "gloo", or load with device_map="cuda"'
        )


def _num_nodes(hosts: tuple[str, ...]) -> int:
    """Machines, where each has a block of equally many ranks; else all count as one."""
    names = list(dict.fromkeys(hosts))
    per_node = len(hosts) // len(names)
    in_blocks = all(
        host == names[min(g // per_node, len(names) - 1)] for g, host in enumerate(hosts)
    )
    return len(names) if in_blocks and per_node * len(names) == len(hosts) else 1
