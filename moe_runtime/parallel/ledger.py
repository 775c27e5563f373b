"""Every collective of expert parallelism, with the bytes and messages that it takes.

G ranks, R rows.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from moe_runtime.errors import ParallelError

# These stand for a layer where traffic belongs to none.
CONTROL = -1  # agreements, results
CONTEXT = -2  # keys and values that every rank keeps, of whatever layer
ATTENTION = -3  # the sums of attention whose heads are shared out, of whatever layer
MIGRATION = -4  # experts on their way to another rank


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """What this rank sent for one layer, by destination; what stays on the rank is none."""

    num_bytes: list[int]
    messages: list[int]
    predicted_bytes: list[int]


class Ledger:
    """The collectives of one process group, each counted before it runs.

    Bytes are those that leave the rank, by the rank that needs them: an all-gather sends a rank's
    part to every other, a reduce-scatter sends every other rank the addends of its part. Rings and
    trees move the same sum of bytes over other pairs. A message is a transfer to one rank in one
    collective. Beside the counts stand the bytes that dispatchers expect by their formulas.
    """

    def __init__(
        self,
        group: Any,
        *,
        num_nodes: int = 1,
        device: torch.device | str = "cpu",
        timeout_seconds: float | None = None,
    ) -> None:
        self.rank = distributed.get_rank(group)
        self.num_ranks = distributed.get_world_size(group)
        self.num_nodes = num_nodes
        self.device = torch.device(device)
        self._group = group
        self._waits = f"waits up to {timeout_seconds:g} s" if timeout_seconds else "waits"
        self._num_bytes: dict[int, list[int]] = defaultdict(lambda: [0] * self.num_ranks)
        self._messages: dict[int, list[int]] = defaultdict(lambda: [0] * self.num_ranks)
        self._predicted: dict[int, list[int]] = defaultdict(lambda: [0] * self.num_ranks)
        self._calls: dict[str, int] = defaultdict(int)

    def all_to_all(
        self, layer: int, rows: torch.Tensor, send: Sequence[int], receive: Sequence[int]
    ) -> torch.Tensor:
        """`rows [R, ...]`, by destination, `send[d]` to rank d; returns what came, by source."""
        received = rows.new_empty((sum(receive), *rows.shape[1:]))
        row_bytes = rows[:1].numel() * rows.element_size() if len(rows) else 0
        self._count(layer, [count * row_bytes for count in send])
        self._run(
            "all_to_all",
            layer,
            lambda: distributed.all_to_all_single(
                received, rows.contiguous(), list(receive), list(send), group=self._group
            ),
        )
        return received

    def exchange_counts(
        self, layer: int, counts: Sequence[int], partners: Sequence[int] | None = None
    ) -> list[int]:
        """`counts[d]` goes to rank d; returns what every rank counted for this one.

        With `partners` only these ranks exchange, which all have this one among theirs; the others
        counted 0.
        """
        if partners is None:
            partners = range(self.num_ranks)
        ones = [int(g in partners) for g in range(self.num_ranks)]
        told = [counts[g] for g in range(self.num_ranks) if ones[g]]
        sent = torch.tensor(told, dtype=torch.int32, device=self.device)
        came = iter(self.all_to_all(layer, sent, ones, ones).tolist())  # sync: host splits
        return [next(came) if one else 0 for one in ones]

    def all_gather(self, layer: int, part: torch.Tensor) -> torch.Tensor:
        """`part [R, ...]` of every rank, equally large on all: `[G, R, ...]`."""
        gathered = part.new_empty((self.num_ranks * len(part), *part.shape[1:]))
        self._count(layer, [part.nbytes] * self.num_ranks)
        self._run(
            "all_gather",
            layer,
            lambda: _either("all_gather_single", "all_gather_into_tensor")(
                gathered, part.contiguous(), group=self._group
            ),
        )
        return gathered.view(self.num_ranks, *part.shape)

    def reduce_scatter(self, layer: int, parts: torch.Tensor) -> torch.Tensor:
        """Of `parts [G, R, ...]` the sum over ranks of this rank's own: `[R, ...]`."""
        summed = torch.empty_like(parts[0])
        self._count(layer, [parts[0].nbytes] * self.num_ranks)
        flat = parts.reshape(-1, *parts.shape[2:]).contiguous()
        self._run(
            "reduce_scatter",
            layer,
            lambda: _either("reduce_scatter_single", "reduce_scatter_tensor")(
                summed, flat, group=self._group
            ),
        )
        return summed

    def gather_rows(
        self, layer: int, rows: torch.Tensor, counts: Sequence[int]
    ) -> list[torch.Tensor]:
        """`rows [counts[g], ...]` of every rank g on every rank; ranks need not have equally many.

        One message to each other rank that has none of the rows yet, and none from a rank without.
        """
        return self._post("gather_rows", layer, [rows] * self.num_ranks, counts)

    def send_sums(
        self, layer: int, parts: Sequence[torch.Tensor], counts: Sequence[int]
    ) -> list[torch.Tensor]:
        """`parts[d] [n, ...]`, addends for rank d; returns `counts[g]` addends of each rank g.

        The rank adds them up, in the order and dtype that it needs. Pairs of ranks without rows
        exchange no message.
        """
        return self._post("send_sums", layer, parts, counts)

    def gather_texts(self, text: str) -> list[str]:
        """The text of every rank, on every rank."""
        raw = torch.frombuffer(bytearray(text.encode()) or bytearray(1), dtype=torch.uint8)
        mine = torch.tensor([len(text.encode())], dtype=torch.int64, device=self.device)
        lengths = self.all_gather(CONTROL, mine).flatten().tolist()
        padded = torch.zeros(max(*lengths, 1), dtype=torch.uint8, device=self.device)
        padded[: lengths[self.rank]] = raw[: lengths[self.rank]].to(self.device)
        rows = self.all_gather(CONTROL, padded).cpu()
        return [
            bytes(row[:length].tolist()).decode() for row, length in zip(rows, lengths, strict=True)
        ]

    def gather_on_first(self, data: bytes) -> list[bytes]:
        """The bytes of every rank on rank 0, and none on the others."""
        others = [0] * (self.num_ranks - 1)
        come = self.exchange_counts(CONTROL, [len(data), *others])
        mine = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self.device)
        came = self.all_to_all(CONTROL, mine, [len(data), *others], come).cpu()
        parts = torch.split(came, come) if self.rank == 0 else ()
        return [part.numpy().tobytes() for part in parts]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self._run("barrier", CONTROL, lambda: distributed.barrier(group=self._group))

    def expect(self, layer: int, num_bytes: Sequence[int]) -> None:
        """A formula says that these bytes are about to go to each rank."""
        self._add(self._predicted, layer, num_bytes)

    def fresh(self) -> "Ledger":
        """The same group, with nothing counted."""
        made = Ledger(self._group, num_nodes=self.num_nodes, device=self.device)
        made._waits = self._waits
        return made

    @property
    def backend(self) -> str:
        """Which library moves the bytes."""
        return str(distributed.get_backend(self._group))

    def sent(self) -> dict[int, Sent]:
        """By layer, what this rank has sent; what is below 0 is no MoE layer."""
        return {
            layer: Sent(
                num_bytes=list(self._num_bytes[layer]),
                messages=list(self._messages[layer]),
                predicted_bytes=list(self._predicted[layer]),
            )
            for layer in sorted(self._num_bytes)
        }

    def calls(self) -> dict[str, int]:
        """How often each collective ran."""
        return dict(self._calls)

    def node_of(self, rank: int) -> int:
        """Ranks stand in the order of nodes, equally many on each."""
        return rank * self.num_nodes // self.num_ranks

    def _post(
        self, name: str, layer: int, parts: Sequence[torch.Tensor], counts: Sequence[int]
    ) -> list[torch.Tensor]:
        """Point to point: `parts[d]` goes to rank d, and `counts[g]` rows come from rank g."""
        like = parts[self.rank]
        came = [like.new_empty((count, *like.shape[1:])) for count in counts]
        came[self.rank].copy_(like)
        self._count(layer, [part.nbytes for part in parts])
        operations = []
        for peer in sorted(set(range(self.num_ranks)) - {self.rank}):
            for verb, tensor in (
                (distributed.isend, parts[peer].contiguous()),
                (distributed.irecv, came[peer]),
            ):
                if tensor.numel():
                    operations.append(
                        distributed.P2POp(verb, tensor, group=self._group, group_peer=peer)
                    )

        def run() -> None:
            # sync: the rows are used at once
            for work in distributed.batch_isend_irecv(operations) if operations else ():
                work.wait()

        self._run(name, layer, run)
        return came

    def _count(self, layer: int, num_bytes: Sequence[int]) -> None:
        self._add(self._num_bytes, layer, num_bytes)
        self._add(self._messages, layer, [int(size > 0) for size in num_bytes])

    def _add(self, book: dict[int, list[int]], layer: int, amounts: Sequence[int]) -> None:
        line = book[layer]
        for rank, amount in enumerate(amounts):
            if rank != self.rank:
                line[rank] += amount

    def _run(self, name: str, layer: int, collective: Callable[[], object]) -> None:
        self._calls[name] += 1
        try:
            collective()
        except RuntimeError as error:  # torch has no narrower class for what gloo reports
            where = "between MoE layers" if layer < 0 else f"in MoE layer {layer}"
            first = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
            raise ParallelError(
                f"rank {self.rank} of {self.num_ranks} lost the others in {name} {where} "
                f"({first}); a rank {self._waits} for one that died, hangs, or left before "
                "finish(); see the first error of the other ranks, or raise the time-out"
            ) from error


def _either(name: str, older: str) -> Callable[..., object]:
    """A collective by its name of torch 2.13, or by the one before."""
    collective: Callable[..., object] = getattr(distributed, name, None) or getattr(
        distributed, older
    )
    return collective
