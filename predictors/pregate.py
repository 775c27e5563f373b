"""A router of its own ahead of the model, after Read-ME (arXiv 2410.19123, sections 3.2 and 4).

One causal transformer block reads token ids and says every layer's choice before the first layer
runs. It is distilled on the gates of an existing model, whose routing it does not replace: how far
it agrees with them is all that is claimed. Read-ME chooses one expert index for all layers, which
an existing model does not; here each layer has its own head.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

from moe_runtime.predictors.counts import check_fit, frequency
from moe_runtime.predictors.path_network import PathNetwork, PathSettings
from moe_runtime.predictors.path_training import train_on_paths
from moe_runtime.predictors.predictor import Fingerprint, ModelFacts, Progress, State, silent
from moe_runtime.predictors.routing_path import PathSession, network_of, network_state
from moe_runtime.trace import Trace


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pregate:
    """The distilled router: cross-entropy with the gates' first choices and with their shares."""

    name: ClassVar[str] = "pregate"
    needs: ClassVar[frozenset[str]] = frozenset({"token_id"})

    fingerprint: Fingerprint
    network: PathNetwork

    @classmethod
    def fit(cls, trace: Trace, facts: ModelFacts, on_progress: Progress = silent) -> Self:
        check_fit(cls.name, cls.needs, trace, facts)
        settings = PathSettings.within_budget(
            trace, facts, has_encoder=False, num_decoder_blocks=1, is_softmax=True
        )
        network = train_on_paths(settings, trace, facts, frequency(trace), on_progress)
        return cls(fingerprint=facts.fingerprint, network=network)

    def start(self) -> PathSession:
        return PathSession(self.network)

    def state(self) -> State:
        return network_state(self.network)

    @classmethod
    def of_state(cls, fingerprint: Fingerprint, state: State) -> Self:
        return cls(fingerprint=fingerprint, network=network_of(state))
