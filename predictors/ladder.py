"""The kinds of predictors that stand on their own, from the plainest to the largest."""

from moe_runtime.predictors.activation_matrix import ActivationMatrix
from moe_runtime.predictors.frequency import Frequency
from moe_runtime.predictors.gate_lookahead import GateCorrected, GateLookahead
from moe_runtime.predictors.markov import Markov, Markov2
from moe_runtime.predictors.predictor import Predictor
from moe_runtime.predictors.pregate import Pregate
from moe_runtime.predictors.previous_token import PreviousToken
from moe_runtime.predictors.random_guess import RandomGuess
from moe_runtime.predictors.routing_path import RoutingPath, RoutingPathDecoder
from moe_runtime.predictors.token_table import TokenTable

LADDER: tuple[type[Predictor], ...] = (
    RandomGuess,
    Frequency,
    PreviousToken,
    ActivationMatrix,
    Markov,
    Markov2,
    TokenTable,
    GateLookahead,
    GateCorrected,
    Pregate,
    RoutingPathDecoder,
    RoutingPath,
)
