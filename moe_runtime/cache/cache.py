"""Which expert is in which slot, and who makes room for whom."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from moe_runtime.cache.policy import EvictionPolicy
from moe_runtime.expert import ExpertKey

# The slot that a missing key is read into, and the key that had it until now.
Read = tuple[int, ExpertKey | None]


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
    counts: defaultdict[int, LayerCounts] = field(default_factory=lambda: defaultdict(LayerCounts))
    _slots: dict[ExpertKey, int] = field(default_factory=dict)
    _demoted: dict[ExpertKey, None] = field(default_factory=dict)  # leave before all others
    _free: list[int] = field(init=False)

    def __post_init__(self) -> None:
        assert self.num_slots > 0, self.num_slots
        self._free = list(range(self.num_slots - 1, -1, -1))

    def __contains__(self, key: object) -> bool:
        return key in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    def resident(self) -> list[ExpertKey]:
        """Every key that has a slot."""
        return list(self._slots)

    def slot(self, key: ExpertKey) -> int:
        """The slot that holds `key`; KeyError if none does."""
        return self._slots[key]

    def admit(self, keys: Sequence[ExpertKey]) -> list[Access]:
        """Decide as `decide` does, and say for each key where it is or must be read into."""
        held, reads = self.decide(keys)
        next_read = iter(reads)
        return [
            Access(key, slot, True, None) if slot is not None else _miss(key, next(next_read))
            for key, slot in zip(keys, held, strict=True)
        ]

    def decide(self, keys: Sequence[ExpertKey]) -> tuple[list[int | None], list[Read]]:
        """Plan one layer of one forward: distinct `keys` are what it needs, in order of use.

        Returns the slot of each key, None where it misses, and the reads of those that miss, in
        order. What the layer needs is pinned until used: a key read for this layer is not evicted
        by a later miss of the same layer. With more keys than slots the layer runs in waves: keys
        already passed may leave, each is still read at most once. If keys not yet passed fill
        every slot, the one used last makes room, and is read again at its turn.
        """
        slots, free, policy = self._slots, self._free, self.policy
        if keys:
            policy.visit(keys)
        held = list(map(slots.get, keys))
        for key in keys if self._demoted else ():
            self._demoted.pop(key, None)
        reads: list[Read] = []
        if None not in held:  # the common case, kept short
            for key in keys:
                policy.touch(key)
        else:
            fits = len(keys) <= self.num_slots
            pinned = set(keys)
            for position, key in enumerate(keys):
                if not fits:
                    pinned.discard(key)
                    held[position] = slots.get(key)  # an earlier miss may have evicted it
                if held[position] is None:
                    if free:
                        slot, evicted = free.pop(), None
                    else:
                        evicted = self._victim(pinned)
                        if evicted is None:
                            evicted = next(key for key in reversed(keys) if key in slots)
                        slot = self._evict(evicted)
                    slots[key] = slot
                    reads.append((slot, evicted))
                policy.touch(key)
        if keys:
            counts = self.counts[keys[0].layer]
            counts.hits += len(keys) - len(reads)
            counts.misses += len(reads)
        return held, reads

    def prefetch(
        self,
        key: ExpertKey,
        pinned: AbstractSet[ExpertKey],
        is_worth: Callable[[ExpertKey, ExpertKey], bool],
    ) -> Read | None:
        """Plan a read of the absent `key` before a layer asks for it, or None.

        What the layer that runs needs is `pinned` and stays. A full cache gives the policy's victim
        up only where `is_worth(key, victim)`. No access is counted.
        """
        assert key not in self._slots, key
        if self._free:
            slot, evicted = self._free.pop(), None
        else:
            evicted = self._victim(pinned)
            if evicted is None or not is_worth(key, evicted):
                return None
            slot = self._evict(evicted)
        self._slots[key] = slot
        self.policy.touch(key)
        return slot, evicted

    def demote(self, key: ExpertKey) -> None:
        """Let `key`, which was read for a use that did not come, leave before all others."""
        if key in self._slots:
            self._demoted[key] = None

    def discard(self, key: ExpertKey) -> None:
        """Forget `key`, whose slot does not hold it after all."""
        slot = self._slots.pop(key, None)
        if slot is not None:
            self._demoted.pop(key, None)
            self.policy.forget(key)
            self._free.append(slot)

    def give_up_all(self) -> list[ExpertKey]:
        """Forget every key, in the order in which it would be evicted; returns the last first."""
        leaving: list[ExpertKey] = []
        while (key := self._victim(frozenset())) is not None:
            self._free.append(self._evict(key))
            leaving.append(key)
        return leaving[::-1]

    def clear(self) -> None:
        """Forget every key, also after an interrupt that left `decide` half done."""
        for key in list(self._slots):
            self.policy.forget(key)
        self._slots.clear()
        self._demoted.clear()
        self._free = list(range(self.num_slots - 1, -1, -1))

    def _victim(self, pinned: AbstractSet[ExpertKey]) -> ExpertKey | None:
        for key in self._demoted:
            if key not in pinned:
                return key
        return self.policy.victim(pinned)

    def _evict(self, key: ExpertKey) -> int:
        self.policy.forget(key)
        self._demoted.pop(key, None)
        return self._slots.pop(key)


def _miss(key: ExpertKey, read: Read) -> Access:
    slot, evicted = read
    return Access(key, slot, False, evicted)
