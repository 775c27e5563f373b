"""Decoder layers whose dense matrices are in memory while they run, read ahead in a window.

TPI-LLM's sliding window (arXiv 2410.00531), with the engine that serves experts: a decoder layer is
the one expert of a layer that every token uses. With room for W of L layers a pass reads L - W + 2
of them at most, each while the layer before it computes; the others stay where they are.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe_runtime.cache.scan import ScanPolicy
from moe_runtime.engine import ExpertEngine
from moe_runtime.memory.disk import DiskReader
from moe_runtime.memory.slots import HostSlots
from moe_runtime.memory.tensor_map import TensorMap
from moe_runtime.offline.layer_stream import LayerStream


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowPlan:
    """What a model's layers leave out of memory: `places[i]` of layer i, by name in `modules[i]`.

    `dense_bytes` are in memory at a time: what is not of the layers, and `num_layers` of them.
    """

    modules: tuple[nn.Module, ...]
    places: tuple[Mapping[str, tuple[nn.Module, str]], ...]
    tensor_map: TensorMap
    dense_names: list[str]  # tensors of the checkpoint that are left to load
    num_layers: int
    dense_bytes: int

    def take_weights(self) -> None:
        """Drop the meta parameters: the loader must neither look for them nor initialise them."""
        for owner, attribute in (place for of in self.places for place in of.values()):
            owner._parameters[attribute] = None
            owner.__dict__["_is_hf_initialized"] = True


class LayerWindow:
    """Owns the slots, the cache and the threads of a model's dense layers."""

    def __init__(self, plan: WindowPlan, *, direct: bool) -> None:
        self.plan = plan
        tensor_map, policy = plan.tensor_map, ScanPolicy()
        reader = DiskReader(tensor_map.files(), direct=direct)
        try:
            slots = HostSlots(plan.num_layers, tensor_map.slot_bytes)
        except BaseException:
            reader.close()
            raise
        self.engine = ExpertEngine(tensor_map, slots, policy, reader)
        stream = LayerStream(self.engine.cache, policy, [1] * len(plan.modules))
        stream.is_on = True
        self.engine.planner = stream

    def states(self) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
        """Each layer's module, and what makes an `OffloadedExpert` of it."""
        for layer, (module, places) in enumerate(
            zip(self.plan.modules, self.plan.places, strict=True)
        ):
            specs = self.plan.tensor_map.layers[layer].layout.parameters
            for spec in specs:
                owner, attribute = places[spec.name]
                absent = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
                owner._parameters[attribute] = nn.Parameter(absent, requires_grad=False)
            yield (
                module,
                {
                    "_expert": 0,
                    "_places": places,
                    "_engine": self.engine,
                    "_layer": layer,
                    "_slot_like": torch.empty(0, dtype=specs[0].dtype),
                },
            )

    def restore(self) -> None:
        """Read every layer back into its module."""
        for layer, places in enumerate(self.plan.places):
            with self.engine.open_layer(layer, [0]) as access:
                for name, value in access.weights(0).items():
                    owner, attribute = places[name]
                    owner._parameters[attribute] = nn.Parameter(value.clone(), requires_grad=False)

    def placement(self) -> str:
        """Half a line: how many layers have their weights in memory."""
        return f"those of {self.plan.num_layers} of {len(self.plan.modules)} layers at a time"

    def report(self) -> dict[str, int | float]:
        """Counts since loading."""
        return {
            "layers": len(self.plan.modules),
            "layers_in_memory": self.plan.num_layers,
            "layer_bytes": self.plan.tensor_map.slot_bytes,
            "bytes_read": self.engine.bytes_read,
            "stall_seconds": self.engine.times.stall_seconds,
        }

    def close(self) -> None:
        """Free slots, threads and files. Safe to call twice."""
        self.engine.close()
