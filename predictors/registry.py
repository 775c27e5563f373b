"""Every kind of predictor, by name."""

from collections.abc import Mapping

from moe_runtime.predictors.ensemble import Ensemble
from moe_runtime.predictors.ladder import LADDER
from moe_runtime.predictors.predictor import Predictor
from moe_runtime.predictors.reuse_network import ReuseNetwork

_KINDS: tuple[type[Predictor], ...] = (*LADDER, ReuseNetwork, Ensemble)
PREDICTORS: Mapping[str, type[Predictor]] = {kind.name: kind for kind in _KINDS}
