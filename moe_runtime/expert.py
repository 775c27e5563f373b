"""The name of one expert."""

from typing import NamedTuple


class ExpertKey(NamedTuple):
    """Expert `expert` of Mixture-of-Experts layer `layer` (both count from 0).

    `layer` numbers the MoE layers of a model in order; a dense layer between them has no number.
    """

    layer: int
    expert: int
