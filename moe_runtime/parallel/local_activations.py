"""How many of a rank's (token, expert) pairs find the expert where the token is."""

import torch


class LocalActivations:
    """Sums over layers and forwards, with ids that the tables have seen and others apart."""

    def __init__(self) -> None:
        self._local = {True: 0, False: 0}
        self._all = {True: 0, False: 0}

    def add(self, is_local_TK: torch.Tensor, is_seen_T: torch.Tensor) -> None:
        """One layer of a forward."""
        for is_seen in (True, False):
            pairs = is_local_TK[is_seen_T == is_seen]
            self._local[is_seen] += int(pairs.sum())  # sync: a count for reports
            self._all[is_seen] += pairs.numel()

    def report(self) -> dict[str, int]:
        """Pairs, and those of them that are local."""
        return {
            "seen_pairs": self._all[True],
            "seen_local_pairs": self._local[True],
            "unseen_pairs": self._all[False],
            "unseen_local_pairs": self._local[False],
        }
