"""The process of one contestant: `python -m moe_runtime.measure.bench.worker MODULE`.

Reads one request a line from stdin and answers each with one line of JSON on what was stdout;
whatever libraries print goes to stderr. Ends at `quit`, or when nobody can ask any more.
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from moe_runtime.measure.bench.job import Job
from moe_runtime.measure.peers.peer import Loader, Peer

Request = dict[str, Any]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _volunteer_for_the_out_of_memory_killer()
    _Worker(sys.argv[1]).serve(sys.stdin, answers)


class _Worker:
    def __init__(self, module: str) -> None:
        self._module = module
        self._loader: Loader | None = None
        self._peer: Peer | None = None

    def serve(self, requests: TextIO, answers: TextIO) -> None:
        for line in requests:
            request = json.loads(line)
            if request["do"] == "quit":
                return
            try:
                answer = getattr(self, f"_do_{request['do']}")(request)
            except Exception as error:  # whatever a peer raises is the reason in its row
                said = " ".join(str(error).split())
                answer = {"error": f"{type(error).__name__}: {said}"}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()

    def _do_import(self, request: Request) -> dict[str, Any]:
        module: Any = importlib.import_module(f"moe_runtime.measure.peers.{self._module}")
        self._loader = module
        return {}

    def _do_load(self, request: Request) -> dict[str, Any]:
        assert self._loader is not None
        self._peer, facts = self._loader.load(Job.from_message(request["job"]))
        return {"facts": facts}

    def _do_run(self, request: Request) -> dict[str, Any]:
        """Decode tokens as a new sequence until they or the seconds have run out, at least one."""
        peer = self._peer
        assert peer is not None
        before = peer.counters()
        milliseconds, logits = [], []
        peer.start(request["variant"], request["first_row"])
        begin = time.perf_counter()
        for token in request["tokens"]:
            start = time.perf_counter()
            peer.step(token)
            end = time.perf_counter()
            milliseconds.append((end - start) * 1e3)
            if request["logits"] is not None:
                logits.append(peer.logits())
            if end - begin > request["seconds"]:
                break
        if request["logits"] is not None:
            np.save(request["logits"], np.stack(logits))
        counted = {name: value - before[name] for name, value in peer.counters().items()}
        return {"milliseconds": milliseconds, "counters": counted}


def _volunteer_for_the_out_of_memory_killer() -> None:
    """If the machine runs out of memory, a contestant must go, not the one that asked."""
    try:
        Path("/proc/self/oom_score_adj").write_text("1000")
    except OSError:  # not Linux
        pass


if __name__ == "__main__":
    main()
