"""Whole routing paths from token ids, after ExpertFlow's predictor (arXiv 2410.17954, section 3.1).

An encoder reads the prompt; a causal decoder with its own KV cache reads the tokens that are
emitted, and looks at the prompt through the encoder's states. A linear head of E logits a layer
says, before the first layer runs, which experts a token uses in each. Prompt tokens are foretold
from the encoder's states. `RoutingPathDecoder` is the ablation: no encoder, and the decoder reads
prompt and continuation alike.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from moe_runtime.predictors.path_predictor import PathPredictor


class RoutingPath(PathPredictor):
    """The encoder-decoder."""

    __slots__ = ()

    name: ClassVar[str] = "routing_path"
    shape: ClassVar[Mapping[str, Any]] = {"has_encoder": True}


class RoutingPathDecoder(PathPredictor):
    """The decoder alone, which what the encoder is worth is measured against."""

    __slots__ = ()

    name: ClassVar[str] = "routing_path_decoder"
    shape: ClassVar[Mapping[str, Any]] = {"has_encoder": False}
