"""How long a decode step and a prefill take with a cache of experts, on lanes that overlap.

Lanes are arithmetic (which reads weights from memory), the link to a GPU, and the disk.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from moe_runtime.model_spec import FORMAT_BITS, ModelSpec
from moe_runtime.perf.hit_curve import LRU_PRIOR, PLEC_PRIOR, HitCurve
from moe_runtime.perf.overheads import Overheads
from moe_runtime.perf.part_seconds import PartSeconds
from moe_runtime.perf.rates import Rates

# Packed experts take this share of their bytes, lossless; rounded ones those of bfloat16 over it.
PACKED_SHARE = 0.751
ROUNDED_SHRINK = {"int8": 1.95, "int4": 3.5}
MOST_KERNEL_ROWS = 8
LRU, LFU, PLEC = "lru", "lfu", "plec"
PLEC_SECONDS = 1.5e-3  # its own time a token
# Reading ahead by the model's own routers: their recall a layer ahead; the share of what lanes
# allow that an oracle gained on two cores, 3 to 5 % where they allow 25 %, as threads that
# compute in lockstep wait for the one beside a reader; and predicting itself, a layer and forward
# (docs/benchmarks/prefetch_2-core-epyc_2026-11-23.md).
LOOKAHEAD_RECALL = 0.8
REALISED_SHARE = 0.2
FORETELL_SECONDS = 0.2e-3
# A quantised expert is expanded when it is used: written and read once more in 16 bits.
_EXPANSIONS = 2


class Lane(StrEnum):
    """What a step waits for."""

    COMPUTE = "memory and arithmetic"
    LINK = "link to the GPU"
    DISK = "disk"
    SOFTWARE = "software"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertForm:
    """How experts stand in slots and on disk; `used_bytes` are read from memory for one use."""

    name: str
    slot_bytes: float
    disk_bytes: float
    used_bytes: float
    is_lossless: bool

    @classmethod
    def all_of(cls, spec: ModelSpec) -> "list[ExpertForm]":
        """That this checkpoint can have, lossless ones first; the preferred one first."""
        size = float(spec.expert_bytes)
        if spec.expert_format not in ("bfloat16", "float16", "float32"):
            plain = size * 16 / FORMAT_BITS[spec.expert_format]
            used = size + _EXPANSIONS * plain
            return [_form(spec.expert_format, size, size, used)]
        on_disk = PACKED_SHARE * size if spec.is_packed else size
        forms = [_form("unpacked", size, on_disk, size)]
        if spec.is_packed:
            packed = PACKED_SHARE * size
            forms.insert(0, _form("packed", packed, packed, packed))
        elif spec.expert_format == "bfloat16":
            forms += [
                _form(name, size / shrink, size, size / shrink, is_lossless=False)
                for name, shrink in ROUNDED_SHRINK.items()
            ]
        return forms


def _form(
    name: str, slot: float, disk: float, used: float, *, is_lossless: bool = True
) -> ExpertForm:
    return ExpertForm(
        name=name, slot_bytes=slot, disk_bytes=disk, used_bytes=used, is_lossless=is_lossless
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a step is estimated for: slots where experts are computed, and behind them on the host.

    `num_host_slots` is 0 where experts are computed on the CPU.
    """

    form: ExpertForm
    num_slots: int
    num_host_slots: int
    batch: int
    context_tokens: int
    policy: str = LRU
    reads_ahead: bool = False
    linears: bool = False
    page_cache: bool = False  # which has all experts' files
    computes_misses: bool = False  # on the CPU, where a GPU lacks an expert

    @property
    def uses_kernel(self) -> bool:
        """Whether the experts' kernel computes linear layers too: it takes few rows alone."""
        return self.linears and self.batch <= MOST_KERNEL_ROWS


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One decode step. `lanes` are busy seconds, which overlap; `gain_seconds` is prediction's."""

    seconds: float
    lanes: dict[Lane, float]
    hit_rate: float
    host_hit_rate: float
    missed_experts: float
    gain_seconds: float

    @property
    def bottleneck(self) -> Lane:
        """The lane that is busy longest."""
        return max(self.lanes, key=lambda lane: self.lanes[lane])


class LatencyModel:
    """One model on one machine, with the hit rates of `curves` by policy, or stated priors.

    Where there are curves, that of lru is among them, and stands in for a policy without one.
    """

    def __init__(
        self,
        spec: ModelSpec,
        rates: Rates,
        curves: Mapping[str, HitCurve] | None = None,
        *,
        overheads: Overheads | None = None,
    ) -> None:
        self.spec = spec
        self.rates = rates
        self._parts = PartSeconds.on(rates, overheads)
        self._curves = curves or {LRU: LRU_PRIOR, PLEC: PLEC_PRIOR}

    def hit_rate(self, setup: Setup, num_slots: int) -> float:
        """Of so many slots under the policy of `setup`."""
        return self._curve(setup).at(num_slots, self.spec, setup.batch)

    def _used_experts(self, setup: Setup) -> float:
        return self._curve(setup).used_experts(self.spec, setup.batch)

    def _curve(self, setup: Setup) -> HitCurve:
        return self._curves.get(setup.policy, self._curves[LRU])

    def step(self, setup: Setup) -> Step:
        """One new token for each of `batch` sequences.

        For L layers of which each uses A/L experts, M/L of them missing,

            t = L (dense + max(A/L expert, M/L fetch + expert)) - gain
            gain = max(0, realised recall L min(M/L fetch, dense) - L foretell)

        as a layer computes what it has while the rest is read, and the last one read is computed
        after it has come. Reading ahead gains at most the sum of min(copy, compute) (arXiv
        2603.19289), of which what runs beside the layer's own reads is taken already. Assumes
        layers alike, routing as `active_experts` does, and lanes that do not slow each other down.
        """
        spec, rates = self.spec, self.rates
        num_layers = len(spec.moe_layers)
        used = self._used_experts(setup)
        rows = setup.batch * spec.experts_per_token / used
        hit_rate = self.hit_rate(setup, setup.num_slots)
        missed = used * (1 - hit_rate)
        host_rate = 1.0
        if rates.link_bytes_per_second is not None:
            reach = min(spec.num_experts, setup.num_slots + setup.num_host_slots)
            beyond = 1 - self.hit_rate(setup, reach)
            host_rate = 1 - min(1.0, beyond / max(1 - hit_rate, 1e-12))
        elif missed:
            host_rate = 0.0
        parts, form = self._parts, setup.form
        dense = self._dense_seconds(setup)
        software = self._software_seconds(setup, missed)
        expert = parts.expert(form.used_bytes, rows)
        disk = parts.reading(missed * (1 - host_rate) * form.disk_bytes, is_cached=setup.page_cache)
        link, extra = 0.0, 0.0
        if setup.computes_misses:
            extra = missed * parts.host_expert(form.used_bytes, rows)
        else:
            link = parts.copying(missed * form.slot_bytes)
        fetch = max(disk, link) + extra
        present = used * expert if not extra else (used - missed) * expert
        waits = fetch + (expert * num_layers if missed and not extra else 0.0)
        ahead = dense + software
        gain = 0.0
        if setup.reads_ahead and not extra:
            gain = REALISED_SHARE * LOOKAHEAD_RECALL * min(fetch, ahead)
            # A gate ends what gains nothing.
            gain = max(0.0, gain - num_layers * FORETELL_SECONDS)
        seconds = ahead + max(present, waits) - gain
        return Step(
            seconds=seconds,
            lanes={
                Lane.COMPUTE: dense + present + extra,
                Lane.LINK: link,
                Lane.DISK: disk,
                Lane.SOFTWARE: software,
            },
            hit_rate=hit_rate,
            host_hit_rate=host_rate,
            missed_experts=missed,
            gain_seconds=gain,
        )

    def prefill_seconds(self, setup: Setup, prompt_tokens: int) -> float:
        """Of `batch` prompts together, in one forward.

        max(reads, arithmetic) + software: each expert that they use is read once, unless all are
        in slots, as a cache that is passed through in order keeps nothing for the next pass.
        Assumes overlap of reads and arithmetic, and causal attention over half the prompt.
        """
        spec, rates = self.spec, self.rates
        tokens = setup.batch * prompt_tokens
        used = spec.active_experts(tokens)
        rows = tokens * spec.experts_per_token / used
        parts, form = self._parts, setup.form
        compute = used * parts.expert(form.used_bytes, rows)
        compute += parts.dense(spec.step_bytes, tokens, uses_kernel=False)
        flops = rates.linear.flops(spec.value_bytes)
        compute += tokens * spec.attention_flops(prompt_tokens) / 2 / flops
        absent = 0.0 if setup.num_slots >= spec.num_experts else used
        from_disk = absent
        if rates.link_bytes_per_second is not None:
            is_held = setup.num_slots + setup.num_host_slots >= spec.num_experts
            from_disk = 0.0 if is_held else absent
        fetch = max(
            parts.copying(absent * form.slot_bytes),
            parts.reading(from_disk * form.disk_bytes, is_cached=setup.page_cache),
        )
        return max(fetch, compute) + self._software_seconds(
            replace(setup, batch=tokens, context_tokens=0), absent
        )

    def _dense_seconds(self, setup: Setup) -> float:
        """Of dense weights, and of the attention cache."""
        weights = self._parts.dense(
            self.spec.step_bytes, setup.batch, uses_kernel=setup.uses_kernel
        )
        cached = setup.batch * self.spec.kv_bytes(setup.context_tokens)
        return weights + self._parts.appending(cached)

    def _software_seconds(self, setup: Setup, missed: float) -> float:
        """Of layers, of rows in each, of experts that are missing, and of attention."""
        parts = self._parts
        seconds = parts.layers(
            len(self.spec.layers), setup.batch, uses_kernel=setup.uses_kernel
        ) + parts.starting_reads(missed)
        seconds += parts.attention(setup.batch * self.spec.attention_flops(setup.context_tokens))
        return seconds + (setup.batch * PLEC_SECONDS if setup.policy == PLEC else 0.0)
