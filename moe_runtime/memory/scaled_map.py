"""Which bytes of which files make the blob of an expert that stays quantised."""

from dataclasses import replace
from functools import lru_cache

from moe_runtime.expert import ExpertKey
from moe_runtime.memory.layout import ExpertLayout
from moe_runtime.memory.safetensors_header import FileTensor
from moe_runtime.memory.scaled_blob import ScaledBlob
from moe_runtime.memory.tensor_map import Extent, TensorMap


class ScaledMap:
    """Extents and layouts of the experts of a TensorMap whose files hold them quantised."""

    def __init__(self, tensor_map: TensorMap) -> None:
        self._tensor_map = tensor_map
        self._plan = lru_cache(maxsize=None)(self._make_layout)
        self.slot_bytes = tensor_map.slot_bytes
        self.computed_bytes = max(layer.computed.num_bytes for layer in tensor_map.layers)

    @classmethod
    def of(cls, tensor_map: TensorMap) -> "ScaledMap | None":
        """None where no expert is quantised."""
        return cls(tensor_map) if tensor_map.is_scaled else None

    def extents(self, key: ExpertKey) -> tuple[Extent, ...]:
        """What to read, and where in the blob it goes: as it is in the file."""
        return self._tensor_map.extents(key)

    def layout(self, key: ExpertKey) -> ExpertLayout:
        """The blob, and the parameters that it dequantises to; the same object every time."""
        return self._plan(key)

    def _make_layout(self, key: ExpertKey) -> ExpertLayout:
        layer = self._tensor_map.layers[key.layer]
        stored = self._tensor_map.layout(key)
        if layer.scaled is None:  # beside layers that are
            return replace(stored, compact=ScaledBlob(stored, ()))
        scaled = layer.scaled
        names = [spec.name for spec in scaled.computed.parameters]
        phases = [scaled.phases[name][key.expert] if scaled.phases else 0 for name in names]
        parts = tuple(replace(part, source=self._source(key, part.scales)) for part in scaled.parts)
        return replace(scaled.computed.at(phases), compact=ScaledBlob(stored, parts))

    def _source(self, key: ExpertKey, name: str) -> FileTensor:
        place = self._tensor_map.layers[key.layer].parameters[name]
        return place.select(0, key.expert).boxes[0].source
