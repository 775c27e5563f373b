"""What an eviction policy is."""

from collections.abc import Mapping, Set
from typing import Protocol

from moe_runtime.expert import ExpertKey


class EvictionPolicy(Protocol):
    """Decides who leaves a full cache. Knows keys only: no bytes, tensors or time."""

    @property
    def name(self) -> str:
        """What reports call it."""

    def touch(self, key: ExpertKey) -> None:
        """`key` is used now; it is resident from here on."""

    def victim(self, pinned: Set[ExpertKey]) -> ExpertKey | None:
        """The resident key to evict, not in `pinned`; None if all are pinned. Changes nothing."""

    def forget(self, key: ExpertKey) -> None:
        """`key` is no longer resident, if it was."""

    def advise(self, predictions: Mapping[ExpertKey, float]) -> None:
        """Probabilities of use in the near future; a policy may ignore them."""
