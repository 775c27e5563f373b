"""A router of its own ahead of the model, after Read-ME (arXiv 2410.19123, sections 3.2 and 4).

One causal transformer block reads token ids and says every layer's choice before the first layer
runs. It is distilled on the gates of an existing model, whose routing it does not replace: how far
it agrees with them is all that is claimed. Read-ME chooses one expert index for all layers, which
an existing model does not; here each layer has its own head.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from moe_runtime.predictors.path_predictor import PathPredictor


class Pregate(PathPredictor):
    """The distilled router: cross-entropy with the gates' first choices and with their shares."""

    __slots__ = ()

    name: ClassVar[str] = "pregate"
    shape: ClassVar[Mapping[str, Any]] = {
        "has_encoder": False,
        "num_decoder_blocks": 1,
        "is_softmax": True,
    }
