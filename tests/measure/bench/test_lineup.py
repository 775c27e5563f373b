"""A contestant that cannot take part has a row that says why and what to do."""

import pytest

from moe_runtime.measure.bench.lineup import line_up
from moe_runtime.measure.bench.report import Outcome
from moe_runtime.measure.bench.routing import Routing
from moe_runtime.measure.peers.catalog import PEERS, Contestant, choose_peers

FORCED = Routing(name="forced")
UNIFORM = Routing(name="uniform")


def absent(peer: Contestant, residency: float, routing: Routing, no_gguf: str = "") -> str:
    found = line_up([peer], residency=residency, routing=routing, no_gguf=no_gguf)
    assert [one.name for one in found.starting] == ["moe_runtime"]
    (row,) = found.absent
    assert row.outcome is Outcome.ABSENT
    return row.note


def test_a_peer_that_is_not_installed_is_named_with_the_command_that_installs_it() -> None:
    peer = Contestant(
        name="x", title="X", module="x", packages=("no_such_package",), install="pip install x"
    )
    assert absent(peer, 0.5, FORCED) == "no_such_package not installed: pip install x"


def test_every_peer_with_packages_names_a_command_that_installs_it() -> None:
    assert all("pip install" in peer.install for peer in PEERS.values() if peer.packages)


def test_what_needs_all_weights_has_no_row_below_100_percent() -> None:
    assert "--residency 100" in absent(PEERS["transformers"], 0.65, FORCED)


def test_disk_offload_has_no_row_at_100_percent() -> None:
    assert "transformers itself" in absent(PEERS["accelerate"], 1.0, FORCED)


def test_llama_cpp_cannot_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Contestant, "missing_packages", lambda self: [])
    assert "--routing forced" in absent(PEERS["llama.cpp"], 0.65, UNIFORM)
    assert absent(PEERS["llama.cpp"], 0.65, FORCED, "odd family") == "no GGUF: odd family"


def test_peers_are_chosen_by_name() -> None:
    assert choose_peers("none", "cpu") == []
    assert choose_peers("all", "cpu") == list(PEERS.values())
    assert [peer.name for peer in choose_peers("llama.cpp, accelerate", "cpu")] == [
        "accelerate",
        "llama.cpp",
    ]
    with pytest.raises(ValueError, match=r"'vllm' is unknown; choose all, none, or from transf"):
        choose_peers("vllm", "cpu")
