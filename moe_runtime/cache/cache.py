"""Which expert is in which slot, and who makes room for whom."""

from collections.abc import Sequence, Set
from dataclasses import dataclass, field

from moe_runtime.cache.policy import EvictionPolicy
from moe_runtime.expert import ExpertKey


@dataclass(frozen=True, slots=True)
class Access:
    """One expert that a layer uses: where it is, or where it must be read into.

    `evicted` is the key that the slot held until now. In a layer that needs more experts than there
    are slots it can be an expert of the same layer: the read then waits until that one was used.
    """

    key: ExpertKey
    slot: int
    is_hit: bool
    evicted: ExpertKey | None


@dataclass(slots=True)
class LayerCounts:
    """Accesses of one layer so far."""

    hits: int = 0
    misses: int = 0


@dataclass(slots=True)
class ExpertCache:
    """Slots shared by all layers. Decisions depend on the order of accesses only, never on time."""

    num_slots: int
    policy: EvictionPolicy
    counts: dict[int, LayerCounts] = field(default_factory=dict)
    _slots: dict[ExpertKey, int] = field(default_factory=dict)
    _free: list[int] = field(init=False)

    def __post_init__(self) -> None:
        assert self.num_slots > 0, self.num_slots
        self._free = list(range(self.num_slots - 1, -1, -1))

    def __contains__(self, key: ExpertKey) -> bool:
        return key in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    def slot(self, key: ExpertKey) -> int:
        """The slot that holds `key`; KeyError if none does."""
        return self._slots[key]

    def admit(self, keys: Sequence[ExpertKey]) -> list[Access]:
        """Plan one layer of one forward: `keys` are what it needs, in order of use.

        What the layer needs is pinned until used: a key read for this layer is not evicted by a
        later miss of the same layer. With more keys than slots the layer runs in waves: keys
        already passed may leave, each is still read at most once. If keys not yet passed fill
        every slot, the one used last makes room, and is read again at its turn.
        """
        fits = len(keys) <= self.num_slots
        pinned: Set[ExpertKey] = set(keys)
        accesses = []
        for position, key in enumerate(keys):
            counts = self.counts.setdefault(key.layer, LayerCounts())
            slot = self._slots.get(key)
            if slot is not None:
                counts.hits += 1
                accesses.append(Access(key, slot, True, None))
            else:
                counts.misses += 1
                if not fits and not self._free:
                    pinned = set(keys[position + 1 :])
                slot, evicted = self._make_room(keys, pinned)
                self._slots[key] = slot
                accesses.append(Access(key, slot, False, evicted))
            self.policy.touch(key)
        return accesses

    def discard(self, key: ExpertKey) -> None:
        """Forget `key`, whose slot does not hold it after all."""
        slot = self._slots.pop(key, None)
        if slot is not None:
            self.policy.forget(key)
            self._free.append(slot)

    def clear(self) -> None:
        """Forget every key, also after an interrupt that left `admit` half done."""
        for key in list(self._slots):
            self.policy.forget(key)
        self._slots.clear()
        self._free = list(range(self.num_slots - 1, -1, -1))

    def _make_room(
        self, keys: Sequence[ExpertKey], pinned: Set[ExpertKey]
    ) -> tuple[int, ExpertKey | None]:
        if self._free:
            return self._free.pop(), None
        victim = self.policy.victim(pinned)
        if victim is None:
            victim = next(key for key in reversed(keys) if key in self._slots)
        self.policy.forget(victim)
        return self._slots.pop(victim), victim
