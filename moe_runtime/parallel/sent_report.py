"""What a rank has sent, by its ledger, as reports show it."""

from typing import Any

from moe_runtime.parallel.ledger import ATTENTION, CONTEXT, CONTROL, MIGRATION, Ledger


def sent_report(ledger: Ledger) -> dict[str, Any]:
    """Bytes and messages by rank, by kind and by layer; counts are since loading."""
    everything = ledger.sent()
    to_rank = [
        sum(line.num_bytes[g] for line in everything.values()) for g in range(ledger.num_ranks)
    ]
    node = ledger.node_of(ledger.rank)
    within = sum(size for g, size in enumerate(to_rank) if ledger.node_of(g) == node)
    # What forwards send beside agreements and experts that move.
    layers = {n: line for n, line in everything.items() if n not in (CONTROL, MIGRATION)}
    sums = {n: sum(line.num_bytes) for n, line in everything.items()}
    return {
        "bytes_to_rank": to_rank,
        "messages_to_rank": [
            sum(line.messages[g] for line in everything.values()) for g in range(ledger.num_ranks)
        ],
        "bytes_within_node": within,
        "bytes_between_nodes": sum(to_rank) - within,
        "moe_bytes": sum(sums[n] for n in layers),
        "moe_predicted_bytes": sum(sum(line.predicted_bytes) for line in layers.values()),
        "migration_bytes": sums.get(MIGRATION, 0),
        "context_bytes": sums.get(CONTEXT, 0),
        "attention_bytes": sums.get(ATTENTION, 0),
        "per_layer_bytes": [sums[n] for n in layers if n >= 0],
        "calls": ledger.calls(),
    }
