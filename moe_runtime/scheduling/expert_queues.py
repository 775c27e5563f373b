"""Forms batches of requests that want the same experts, after Read-ME's expert-aware batching."""

from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from moe_runtime.expert import ExpertKey


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What waits: how many tokens it puts into a batch, and the experts it is expected to use."""

    number: int
    num_tokens: int
    experts: AbstractSet[ExpertKey]


class ExpertQueues:
    """A queue for each expert, of the requests that want it.

    A batch takes requests from the longest queue, oldest first, then from the queue that is the
    longest then, until it is full (Read-ME, arXiv 2410.19123, algorithm 1, where a token has one
    expert; here a request stands in the queue of each of its experts). Without a bound, a request
    for a rare expert could wait for ever: one that was passed over `max_passes` times comes first,
    oldest first, so that none is passed over more often than `max_passes` + the older ones that
    waited when it came. 0: first come, first served.
    """

    def __init__(self, *, max_tokens: int, max_passes: int) -> None:
        if max_tokens < 1 or max_passes < 0:
            raise ValueError(
                f"a batch of {max_tokens} tokens, passed over {max_passes} times: give at least 1 "
                "token and 0 times"
            )
        self._max_tokens = max_tokens
        self._max_passes = max_passes
        self._waiting: dict[int, Request] = {}  # by number, oldest first
        self._passes: dict[int, int] = {}
        self._queues: dict[ExpertKey, dict[int, None]] = {}  # numbers, oldest first

    def __len__(self) -> int:
        return len(self._waiting)

    def push(self, request: Request) -> None:
        """`request` waits from now on. Raises ValueError if no batch can ever hold it."""
        if request.number in self._waiting:
            raise ValueError(f"request {request.number} waits already; give each its own number")
        if request.num_tokens > self._max_tokens:
            raise ValueError(
                f"request {request.number} has {request.num_tokens} tokens and a batch holds "
                f"{self._max_tokens}; raise max_tokens"
            )
        self._waiting[request.number] = request
        self._passes[request.number] = 0
        for expert in request.experts:
            self._queues.setdefault(expert, {})[request.number] = None

    def next_batch(self) -> list[Request]:
        """The requests that run together next, in the order taken; empty when none waits."""
        room = self._max_tokens
        batch: list[Request] = []
        overdue = [n for n, passes in self._passes.items() if passes >= self._max_passes]
        room = self._take(overdue, room, batch)
        while room > 0 and self._waiting:
            queue = self._longest(room)
            if queue is None:
                break
            room = self._take(queue, room, batch)
        for number in self._passes:
            self._passes[number] += 1
        return batch

    def _longest(self, room: int) -> list[int] | None:
        """Who waits in the longest queue and fits, or everybody who fits where no expert is known.

        Of equally long queues the one of the oldest request, and then of the first expert.
        """
        fitting = [n for n, request in self._waiting.items() if request.num_tokens <= room]
        if not fitting:
            return None
        fits = set(fitting)
        best: tuple[int, int, ExpertKey] | None = None
        for expert, queue in self._queues.items():
            members = [number for number in queue if number in fits]
            if members:
                rank = (-len(members), members[0], expert)
                best = rank if best is None else min(best, rank)
        return fitting if best is None else [n for n in self._queues[best[2]] if n in fits]

    def _take(self, numbers: list[int], room: int, batch: list[Request]) -> int:
        """Move those of `numbers` that fit from the queues into `batch`; the room that is left."""
        for number in numbers:
            request = self._waiting[number]
            if request.num_tokens > room:
                continue
            room -= request.num_tokens
            batch.append(request)
            del self._waiting[number], self._passes[number]
            for expert in request.experts:
                queue = self._queues[expert]
                del queue[number]
                if not queue:
                    del self._queues[expert]
        return room
