"""What ranks hold and read of a model of 1.4 GB, each in its own process."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.command_line import ROOT, environment
from tests.parallel.rank_pool import free_port
from tests.test_budget_is_kept import (
    ALIGNMENT_SHARE,
    EXPERT_BYTES,
    MEASURE,
    MIB,
    NUM_EXPERTS,
    NUM_LAYERS,
    SLACK_BYTES,
    model_folder,
)

__all__ = ["model_folder"]  # a fixture

NUM_RANKS = 2
# The same program, with its experts shared and the ranks brought to their end together.
ON_RANKS = MEASURE.replace(
    "expert_memory=sys.argv[2])", "expert_memory=sys.argv[2], dispatch='alltoall')"
).replace(
    "report = moe_runtime.handle(model).report()",
    "moe_runtime.handle(model).parallel.finish()\nreport = moe_runtime.handle(model).report()",
)


def start(folder: Path, rank: int, port: int) -> subprocess.Popen[str]:
    meeting = {"RANK": rank, "WORLD_SIZE": NUM_RANKS, "LOCAL_RANK": rank, "MASTER_PORT": port}
    return subprocess.Popen(
        [sys.executable, "-c", ON_RANKS, str(folder), "100%"],
        cwd=ROOT,
        env=environment()
        | {name: str(value) for name, value in meeting.items()}
        | {"MASTER_ADDR": "127.0.0.1"},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_rank_holds_and_reads_its_share_alone(model_folder: Path) -> None:
    """Law: peak over imports <= dense + share + two experts + 100 MiB; reads are the share's."""
    assert "dispatch=" in ON_RANKS
    assert "finish()" in ON_RANKS
    port = free_port()
    started = [start(model_folder, rank, port) for rank in range(NUM_RANKS)]
    reports: list[dict[str, Any]] = []
    for process in started:
        out, _ = process.communicate(timeout=600)
        assert process.returncode == 0
        reports.append(json.loads(out))
    share = NUM_LAYERS * NUM_EXPERTS // NUM_RANKS
    for report in reports:
        memory, cache = report["memory"], report["cache"]
        assert report["parallel"]["experts_held"] == share
        assert memory["expert_total_bytes"] == share * cache["slot_bytes"]
        dense_bytes = memory["dense_bytes"] - memory["mapped_bytes"]
        allowed = dense_bytes + memory["expert_budget_bytes"] + SLACK_BYTES
        assert report["peak"] - report["after_imports"] <= allowed
        missed = cache["misses"] * EXPERT_BYTES
        assert cache["misses"] <= share
        assert missed <= cache["bytes_read"] <= missed * (1 + ALIGNMENT_SHARE)
        if report["settings"]["direct_reads"]:
            assert missed <= report["read_from_disk"] <= missed * (1 + ALIGNMENT_SHARE) + MIB
