"""Gates: from hidden states to each token's experts and their weights.

T tokens, E experts, K top-k, D model dim, P projected dim.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """`index [T, K]` int64, the best expert first, with `weights [T, K]` and `scores [T, E]`.

    Weights and scores are float32, or wider where the model is.
    """

    index: torch.Tensor
    weights: torch.Tensor
    scores: torch.Tensor


class Gate(Protocol):
    """Decides where tokens go."""

    @property
    def num_experts(self) -> int: ...

    def __call__(self, hidden_TD: torch.Tensor) -> Routing: ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _LinearGate:
    """A row of `weight_ED` for each expert."""

    weight_ED: torch.Tensor
    top_k: int

    @property
    def num_experts(self) -> int:
        return len(self.weight_ED)

    def _logits(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        return _project(hidden_TD, self.weight_ED)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SoftmaxGate(_LinearGate):
    """Probabilities over all experts, of which the K largest count.

    p = softmax(h W^T); weights p_k, divided by their sum with `normalize` (Mixtral; Switch
    Transformers, arXiv 2101.03961, equation 2, with K = 1 and not normalised).
    """

    normalize: bool

    def __call__(self, hidden_TD: torch.Tensor) -> Routing:
        return _best(self._logits(hidden_TD).softmax(1), self.top_k, self.normalize)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GShardGate(_LinearGate):
    """Softmax over the logits of the K largest alone (GShard, arXiv 2006.16668, section 2.2).

    As in inference: the noise on logits, the chance by which a second expert is skipped, and the
    capacity that drops tokens are for training, and are left out. Equals SoftmaxGate, normalised.
    """

    top_k: int = 2

    def __call__(self, hidden_TD: torch.Tensor) -> Routing:
        logits_TE = self._logits(hidden_TD)
        best_TK, index_TK = logits_TE.topk(self.top_k, dim=1)
        return Routing(index_TK, best_TK.softmax(1), logits_TE.softmax(1))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SigmoidGate(_LinearGate):
    """Each expert by itself: s = sigmoid(h W^T), weights s_k of the K largest.

    BASE layers (arXiv 2103.16716, equation 1) with K = 1; DeepSeek-V3 (arXiv 2412.19437, equation
    15) divides by their sum with `normalize`.
    """

    normalize: bool

    def __call__(self, hidden_TD: torch.Tensor) -> Routing:
        return _best(self._logits(hidden_TD).sigmoid(), self.top_k, self.normalize)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class XMoEGate:
    """Cosines with experts' embeddings in a small space (X-MoE, arXiv 2204.09179, section 3.1).

    s_e = (W h) . v_e / (|W h| |v_e|); p = softmax(s / temperature); weights p_k of the K largest.
    """

    projection_PD: torch.Tensor
    embedding_EP: torch.Tensor
    temperature: float
    top_k: int

    @property
    def num_experts(self) -> int:
        return len(self.embedding_EP)

    def __call__(self, hidden_TD: torch.Tensor) -> Routing:
        h_TP = functional.normalize(_project(hidden_TD, self.projection_PD), dim=1)
        v_EP = functional.normalize(_wide(self.embedding_EP), dim=1)
        cosines_TE = h_TP @ v_EP.t()
        return _best((cosines_TE / self.temperature).softmax(1), self.top_k, normalize=False)


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _project(hidden_TD: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return functional.linear(_wide(hidden_TD), _wide(weight))


def _best(scores_TE: torch.Tensor, top_k: int, normalize: bool) -> Routing:
    weights_TK, index_TK = scores_TE.topk(top_k, dim=1)
    if normalize:
        weights_TK = weights_TK / weights_TK.sum(1, keepdim=True)
    return Routing(index_TK, weights_TK, scores_TE)
