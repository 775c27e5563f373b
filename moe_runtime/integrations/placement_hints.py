"""What a foreign placement file leaves out, and the user knows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_runtime.errors import PlacementError
from moe_runtime.placement_map import Placement

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementHints:
    """Facts about model and cluster; None where the file must say it, or a default will do."""

    model: str | None = None
    num_experts: int | None = None
    layer_ids: tuple[int, ...] | None = None
    num_hidden_layers: int | None = None
    gpus: int | None = None
    nodes: int = 1
    checkpoint: str = ""  # digest of the model's weights; "" unknown

    def placement(
        self,
        slots: Array,
        *,
        source: str,
        format_name: str,
        gpus: int | None = None,
        layer_ids: Sequence[int] | None = None,
    ) -> Placement:
        """A Placement of `slots` [L, S]. `gpus` and `layer_ids` are what the file itself said.

        Without a word on layers the rows are all of the model's. Raises PlacementError.
        """
        num_gpus = gpus if gpus is not None else self.gpus
        if num_gpus is None:
            raise PlacementError(
                f"{source} does not say how many GPUs its {slots.shape[1]} slots are divided "
                "among; give --gpus"
            )
        if self.gpus is not None and gpus is not None and self.gpus != gpus:
            raise PlacementError(f"{source} is for {gpus} GPUs, and --gpus says {self.gpus}")
        ids = tuple(layer_ids) if layer_ids is not None else self.layer_ids
        if ids is None:
            ids = tuple(range(len(slots)))
        last = ids[-1] + 1 if ids else 0
        try:
            return Placement(
                model=self.model or "unknown",
                checkpoint=self.checkpoint,
                num_experts=self.num_experts or int(slots.max()) + 1,
                num_hidden_layers=self.num_hidden_layers or last,
                layer_ids=ids,
                gpus=num_gpus,
                nodes=self.nodes,
                slots=slots,
                made={"imported_from": format_name},
            )
        except PlacementError as error:
            raise PlacementError(f"{source}: {error}") from error
