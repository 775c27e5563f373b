"""What the ranks that ran one model together made of a request."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from moe_runtime.errors import ParityError
from moe_runtime.measure.generation_request import GenerationRequest
from moe_runtime.measure.parity import Parity

_SAME_ON_ALL = (
    "ranks", "nodes", "dispatch", "payload", "chosen", "expected_bytes", "forwards",
    "forwards_by_chunks", "migrations", "experts_moved",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelGeneration:
    """What all ranks made of a request; every rank has all of it, and rank 0 the verdict.

    `parity` is None where no check was asked for, one failed to run, or a stop came before.
    """

    request: GenerationRequest
    by_rank: list[dict[str, Any]]  # results, report and resident memory of each rank
    num_prompts: int
    parity: Parity | None
    parity_error: ParityError | None

    @property
    def results(self) -> list[dict[str, Any]]:
        """In the order of the prompts; those that a stop left out are absent."""
        found = [result for rank in self.by_rank for result in rank["results"]]
        return sorted(found, key=lambda result: int(result["index"]))

    @property
    def num_tokens(self) -> int:
        """New tokens of all prompts."""
        return sum(len(result["token_ids"]) for result in self.results)

    @property
    def is_terminated(self) -> bool:
        """Whether a rank was asked to stop before all was done."""
        reasons = {result["finish_reason"] for result in self.results}
        return "terminated" in reasons or len(self.results) < self.num_prompts

    def require_parity(self) -> None:
        """Raise ParityError if a check was asked for and did not end well; on rank 0."""
        if self.parity_error is not None:
            raise self.parity_error
        if self.parity is not None:
            self.parity.require()

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        request = asdict(self.request)
        del request["prompts"]
        decoding = request.pop("decoding")
        first = self.by_rank[0]["report"]
        versions = {name: version(name) for name in ("torch", "transformers")}
        check = {"parity": self.parity.as_dict() if self.parity else None}
        return {
            "results": self.results,
            **(check if self.request.check else {}),
            "is_terminated": self.is_terminated,
            "parallel": self.traffic(),
            "ranks": [
                {
                    "rank": rank,
                    "prompts": len(one["results"]),
                    "cache": one["report"]["cache"],
                    "memory": one["report"]["memory"] | one["resident"],
                }
                for rank, one in enumerate(self.by_rank)
            ],
            "settings": request | decoding | first["settings"] | {"versions": versions},
        }

    def traffic(self) -> dict[str, Any]:
        """Bytes and messages from rank (row) to rank (column), and sums over ranks."""
        reports = [one["report"]["parallel"] for one in self.by_rank]
        first = reports[0]
        sums = (
            "moe_bytes",
            "moe_predicted_bytes",
            "bytes_within_node",
            "bytes_between_nodes",
            "migration_bytes",
            "context_bytes",
            "attention_bytes",
        )
        return {
            **{name: first[name] for name in _SAME_ON_ALL},
            "experts_held": [report["experts_held"] for report in reports],
            "bytes": [report["bytes_to_rank"] for report in reports],
            "messages": [report["messages_to_rank"] for report in reports],
            "per_layer_bytes": [
                sum(of_layer)
                for of_layer in zip(*(r["per_layer_bytes"] for r in reports), strict=True)
            ],
            **{name: sum(report[name] for report in reports) for name in sums},
            "all_to_alls": [report["calls"].get("all_to_all", 0) for report in reports],
            "local_activation_rate": _local_rates([report["activations"] for report in reports]),
        }


def _local_rates(activations: Sequence[dict[str, int]]) -> dict[str, float | None] | None:
    """Shares of (token, expert) pairs whose expert is where the token is; None if not counted."""
    total = {name: sum(one[name] for one in activations) for name in activations[0]}
    if not total["seen_pairs"] + total["unseen_pairs"]:
        return None
    rates = {
        name: total[f"{name}_local_pairs"] / total[f"{name}_pairs"]
        if total[f"{name}_pairs"]
        else None
        for name in ("seen", "unseen")
    }
    return rates | {"of_equal_parts": 1 / len(activations)}
