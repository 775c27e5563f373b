"""What an eviction policy is."""

from collections.abc import Mapping, Sequence, Set
from typing import Protocol

from moe_runtime.expert import ExpertKey


class EvictionPolicy(Protocol):
    """Decides who leaves a full cache. Knows keys only: no bytes, tensors or time."""

    @property
    def name(self) -> str:
        """What reports call it."""

    def visit(self, keys: Sequence[ExpertKey]) -> None:
        """One layer is about to use `keys`, at least one and no others; each is touched next."""

    def touch(self, key: ExpertKey) -> None:
        """`key` is used now; it is resident from here on."""

    def victim(self, pinned: Set[ExpertKey]) -> ExpertKey | None:
        """The resident key to evict, not in `pinned`; None if all are pinned. Changes nothing."""

    def forget(self, key: ExpertKey) -> None:
        """`key` is no longer resident, if it was."""

    def advise(self, predictions: Mapping[ExpertKey, float]) -> None:
        """Probabilities of use at the next visit of a key's layer; a policy may ignore them.

        Told before a visit, of what follows that visit. What is no probability counts as unsaid.
        """
