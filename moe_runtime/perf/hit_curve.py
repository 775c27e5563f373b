"""How often a cache of experts hits, over the share of all experts that it holds."""

from dataclasses import dataclass

import numpy as np

from moe_runtime.model_spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class HitCurve:
    """Hit rates of steps of `batch` tokens, at ascending shares of all experts.

    `source` says whose. `used_share` is the share of all experts that such a step uses.
    """

    shares: tuple[float, ...]
    hit_rates: tuple[float, ...]
    used_share: float
    source: str
    batch: int = 1
    is_own: bool = False  # of the very model that is planned

    def used_experts(self, spec: ModelSpec, batch: int) -> float:
        """Distinct ones of a step, over all layers: as recorded, else as uniform routing has."""
        if self.is_own and batch == self.batch:
            return self.used_share * spec.num_experts
        return spec.active_experts(batch)

    def at(self, num_slots: int, spec: ModelSpec, batch: int) -> float:
        """For so many slots and `batch` tokens a step.

        With A experts used together in a step, of N: LRU hits nothing with less than the A - A/L
        that it meets between two visits of a layer. Beyond A the curve is read at the same share x
        of the N - A experts that are left, and its misses shrink as the experts that a step does
        not use do: 1 - (1 - H(x)) (1 - A/N) / (1 - A_1/N). Assumes that sequences of a batch are
        independent and that reuse depends on shares alone, not on the model. A model's own curve is
        read as it is, at its own batch.
        """
        total = spec.num_experts
        if num_slots >= total:
            return 1.0
        if self.is_own and batch == self.batch:
            return float(
                np.interp(num_slots / total, (0.0, *self.shares, 1.0), (0.0, *self.hit_rates, 1.0))
            )
        used = self.used_experts(spec, batch)
        num_layers = len(spec.moe_layers)
        least = used * (1 - 1 / num_layers)
        beyond = max(0.0, (num_slots - used) / max(total - used, 1e-9))
        share = self.used_share + beyond * (1 - self.used_share)
        alone = float(np.interp(share, (*self.shares, 1.0), (*self.hit_rates, 1.0)))
        rate = 1 - (1 - alone) * (1 - used / total) / (1 - self.used_share)
        rate = min(max(rate, 0.0), 1.0)
        if num_slots >= used:
            return rate
        return rate * max(0.0, num_slots - least) / max(used - least, 1e-9)


# 24 layers of 32 experts, 4 a token, 6,000 tokens; the layer that runs is pinned.
_SHARES = (0.125, 0.25, 0.5)
LRU_PRIOR = HitCurve(
    shares=_SHARES,
    hit_rates=(0.453, 0.629, 0.902),
    used_share=0.125,
    source="prior: LRU over gpt-oss-20b's routing",
)
PLEC_PRIOR = HitCurve(
    shares=_SHARES,
    hit_rates=(0.524, 0.730, 0.925),  # 39, 51 and 38 % of the way to Belady's
    used_share=0.125,
    source="prior: plec over gpt-oss-20b's routing",
)
