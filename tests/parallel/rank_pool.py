"""Processes that stay for many tests, each a rank of a gloo group, and run functions together."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

NUM_RANKS = 4
_SECONDS = 600  # never waited for


class RankPool:
    """Four ranks. `run(function, ...)` calls `function(mesh, ...)` on all and returns by rank.

    With `num_ranks=2` the mesh is of ranks 0 and 1, or of 2 and 3, which do the same. Functions
    must be importable, arguments and results picklable. After an exception the pool is closed, as
    the others may wait for the one that failed.
    """

    def __init__(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["moe_runtime.integrations.transformers.load"])
        port = free_port()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(NUM_RANKS):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, port, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any, num_ranks: int) -> list[Any]:
        """What each of the first `num_ranks` returns; raises if one raises."""
        for pipe in self._pipes:
            pipe.send((function, num_ranks, arguments))
        found: dict[int, tuple[Any, str | None]] = {}
        while len(found) < NUM_RANKS:
            silent = {pipe: r for r, pipe in enumerate(self._pipes) if r not in found}
            ready = wait(list(silent), _SECONDS)
            assert ready, f"ranks {sorted(silent.values())} are silent"
            for pipe in ready:
                rank = silent[pipe]  # type: ignore[index]
                found[rank] = self._pipes[rank].recv()
                if found[rank][1] is not None:
                    self.kill()
                assert found[rank][1] is None, f"rank {rank}:\n{found[rank][1]}"
        return [found[rank][0] for rank in range(num_ranks)]

    def close(self) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            if process.is_alive():
                pipe.send(None)
        for process in self._processes:
            process.join(20)
        self.kill()

    def kill(self) -> None:
        """Whatever they do."""
        for process in self._processes:
            process.kill()
            process.join()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _serve(rank: int, port: int, pipe: Connection) -> None:
    os.environ.update(OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", rank=rank, world_size=NUM_RANKS, timeout=timedelta(seconds=_SECONDS / 2)
    )
    meshes: dict[int, DeviceMesh] = {
        1: init_device_mesh("cpu", (NUM_RANKS, 1), mesh_dim_names=("copies", "ep"))["ep"],
        2: init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "ep"))["ep"],
        4: init_device_mesh("cpu", (4,), mesh_dim_names=("ep",)),
    }
    while (asked := pipe.recv()) is not None:
        function, num_ranks, arguments = asked
        try:
            pipe.send((function(meshes[num_ranks], *arguments), None))
        except Exception:
            pipe.send((None, traceback.format_exc()))
    distributed.barrier()
    distributed.destroy_process_group()
