"""The contestants of the offload benchmark, by name; importing it imports none of them."""

import importlib.util
from dataclasses import dataclass

# In bfloat16 every product and sum of another order moves an activation by up to 2^-8; through a
# handful of layers that stays well below this, and a wrong expert or tensor is far above.
_OTHER_ORDER = 5e-2


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """One row of the table. `variants` of one contestant live in one process.

    `tolerance` is for the gate, 0 for equal bits. `needs_all_weights` in memory means no row below
    100 %, and `is_offload_only` none at 100 %. `memory_per_weight` is the most that it takes in
    host memory without a cap, in bytes per byte of the checkpoint.
    """

    name: str
    title: str
    module: str
    packages: tuple[str, ...] = ()
    install: str = ""
    variants: tuple[str, ...] = ("",)
    tolerance: float = 0.0
    needs_all_weights: bool = False
    is_offload_only: bool = False
    replays_routing: bool = True
    reads_gguf: bool = False
    memory_per_weight: float = 1.1

    def missing_packages(self) -> list[str]:
        """Packages to import that are not installed."""
        return [name for name in self.packages if importlib.util.find_spec(name) is None]

    def row_name(self, variant: str) -> str:
        return f"{self.name}-{variant}" if variant else self.name

    def row_title(self, variant: str) -> str:
        return f"{self.title}, {variant}" if variant else self.title


OURS = Contestant(name="moe_runtime", title="moe_runtime", module="ours", tolerance=_OTHER_ORDER)
PEERS = {
    peer.name: peer
    for peer in (
        Contestant(
            name="transformers",
            title="transformers in memory",
            module="transformers_resident",
            variants=("eager", "grouped_mm"),
            tolerance=_OTHER_ORDER,
            needs_all_weights=True,
        ),
        Contestant(
            name="accelerate",
            title="accelerate, experts on disk",
            module="accelerate_disk",
            packages=("accelerate",),
            install="pip install accelerate",
            is_offload_only=True,
        ),
        Contestant(
            name="deepspeed",
            title="DeepSpeed ZeRO-3, parameters in CPU memory",
            module="deepspeed_zero3",
            packages=("deepspeed",),
            install="DS_BUILD_OPS=0 pip install deepspeed",
            tolerance=_OTHER_ORDER,
            memory_per_weight=2.5,  # while it loads and partitions
        ),
        Contestant(
            name="llama.cpp",
            title="llama.cpp, mmap",
            module="llama_cpp",
            packages=("llama_cpp", "gguf"),
            install='CMAKE_ARGS="-DGGML_NATIVE=ON" pip install llama-cpp-python gguf',
            tolerance=_OTHER_ORDER,
            replays_routing=False,
            reads_gguf=True,
        ),
    )
}


# Where weights that a GPU lacks are in host memory.
GPU_PEERS = {
    peer.name: peer
    for peer in (
        PEERS["transformers"],
        Contestant(
            name="accelerate",
            title="accelerate, experts in CPU memory",
            module="accelerate_host",
            packages=("accelerate",),
            install="pip install accelerate",
            tolerance=_OTHER_ORDER,
            is_offload_only=True,
        ),
        PEERS["deepspeed"],
        Contestant(
            name="moe-policylang",
            title="moe-policylang, LRU",
            module="policylang",
            packages=("moe_policylang",),
            install="pip install 'moe-policylang[gpu]'",
            tolerance=_OTHER_ORDER,
        ),
    )
}


def peers_on(device_type: str) -> dict[str, Contestant]:
    """Who can take part where the model computes on a `cpu` or on `cuda`."""
    return PEERS if device_type == "cpu" else GPU_PEERS


def choose_peers(names: str, device_type: str) -> list[Contestant]:
    """`all`, `none`, or names by commas, in the order of the catalog."""
    peers = peers_on(device_type)
    if names == "all":
        return list(peers.values())
    if names == "none":
        return []
    chosen = [name.strip() for name in names.split(",")]
    unknown = [name for name in chosen if name not in peers]
    if unknown:
        raise ValueError(
            f"peer {unknown[0]!r} is unknown; choose all, none, or from {', '.join(peers)}"
        )
    return [peer for peer in peers.values() if peer.name in chosen]
