"""Chooses memory, cache and kernels together: every combination is estimated, the best one kept."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

from moe_runtime.errors import BudgetError, ConfigError
from moe_runtime.perf.bounds import bounds
from moe_runtime.perf.latency import LFU, LRU, PLEC, ExpertForm, LatencyModel, Setup
from moe_runtime.perf.plan import Candidate, MemoryUse, Plan, PlanRequest, Remedy, Settings
from moe_runtime.perf.plan_memory import (
    limit_bytes,
    micro_batch,
    smallest_limit,
    use_memory,
)
from moe_runtime.perf.rates import Rates
from moe_runtime.perf.remedies import changes

_GIB = 2**30
_MOST_BATCH = 512
_LEAST_GAIN = 1.02  # of a remedy that is worth a line


def make_plan(request: PlanRequest) -> Plan:
    """The best settings for `request`, the runner-up, the bottleneck and what would help.

    Raises BudgetError with the smallest budget that works, and ConfigError for a machine whose
    file lacks what the model needs of it.
    """
    ranked = _ranked(request)
    best = ranked[0]
    return Plan(
        goal=request.goal,
        chosen=best,
        others=tuple(ranked[1:]),
        bottleneck=_bottleneck(request, best),
        what_would_help=_what_would_help(request, best),
        lens=bounds(request, best),
        assumptions=_assumptions(request, best),
    )


def decode_rate(request: PlanRequest, candidate: Candidate, context_tokens: int) -> float:
    """Tokens a second of decoding behind so many tokens, with a candidate of a plan for another."""
    setup = replace(candidate.setup, context_tokens=context_tokens)
    return setup.batch / _latency_model(request).step(setup).seconds


def _latency_model(request: PlanRequest) -> LatencyModel:
    spec = request.spec
    rates = Rates.of(request.hardware, value_bytes=spec.value_bytes, read_bytes=spec.expert_bytes)
    return LatencyModel(spec, rates, request.curves)


def _ranked(request: PlanRequest) -> list[Candidate]:
    """All candidates that fit and differ in more than nothing, the fastest first."""
    forms = _forms(request)
    model = _latency_model(request)
    found: dict[Settings, Candidate] = {}
    refused: list[tuple[int, ExpertForm]] = []
    for batch, form in product(_batches(request), forms):
        memory = use_memory(request, form, batch)
        if memory is None:
            refused.append((batch, form))
            continue
        for candidate in _candidates(request, model, form, batch, memory):
            if candidate.tokens_per_second > 0:
                found.setdefault(candidate.settings, candidate)
    if found:
        # Of equals the plainest, which comes first.
        return sorted(found.values(), key=lambda one: -one.tokens_per_second)
    if refused:
        smallest = min(smallest_limit(request, form, batch) for batch, form in refused)
        where = "GPU" if request.hardware.gpus else "CPU"
        raise BudgetError(
            f"{limit_bytes(request)} bytes of {where} memory do not hold the dense weights of "
            f"{request.spec.name}, the attention cache and the experts of one token; the smallest "
            f"budget that works is {smallest} bytes ({smallest / _GIB:.1f} GiB)"
        )
    raise ConfigError(
        f"the hardware file has no disk, and {request.spec.expert_total_bytes} bytes of experts "
        f"do not fit in memory; measure one with moe-runtime probe --path FOLDER"
    )


def _batches(request: PlanRequest) -> Sequence[int]:
    if request.batch is not None:
        return (request.batch,)
    if request.goal == "latency":
        return (1,)
    return tuple(2**power for power in range(_MOST_BATCH.bit_length()))


def _forms(request: PlanRequest) -> list[ExpertForm]:
    """Of experts in slots, that are allowed and not excluded by what is fixed."""
    forms = ExpertForm.all_of(request.spec)
    dtype = request.fixed.get("expert_dtype", "auto")
    slots = request.fixed.get("expert_slots", "auto")
    if dtype != "auto":
        forms = [form for form in forms if form.name == dtype]
    elif slots != "auto":
        forms = [form for form in forms if form.name == slots]
    else:
        may_round = request.allows_lossy and not request.is_exact and not request.hardware.gpus
        forms = [form for form in forms if form.is_lossless or may_round]
    if request.hardware.gpus:
        forms = [form for form in forms if form.name != "packed"]
    if not forms:
        raise ValueError(
            f"expert_slots={slots!r} and expert_dtype={dtype!r} are not to be had for "
            f"{request.spec.name} there; leave them out"
        )
    return forms


def _candidates(
    request: PlanRequest, model: LatencyModel, form: ExpertForm, batch: int, memory: MemoryUse
) -> Iterator[Candidate]:
    """Every combination of what can be switched, the defaults first."""
    spec, fixed = request.spec, request.fixed
    has_gpu = bool(request.hardware.gpus)
    slots = round(memory.expert_bytes // form.slot_bytes)
    host_slots = int(memory.host_expert_bytes // form.slot_bytes)
    holds_all = slots >= spec.num_experts

    def choices(name: str, *options: object) -> Sequence[object]:
        return (fixed[name],) if name in fixed else options

    # What no curve tells of lfu is that it is worse than lru on the priors' own routing.
    policies = (LRU, PLEC, LFU) if LFU in request.curves else (LRU, PLEC)
    kept = choices("policy", *((LRU,) if holds_all else policies))
    ahead = choices("predictor", *(("off",) if holds_all or has_gpu else ("off", "auto")))
    kernels = choices("linears", *((False,) if has_gpu or request.is_exact else (False, True)))
    may_compute = has_gpu and not holds_all and not request.is_exact
    # What the page cache keeps must fit beside all that the plan counts.
    may_cache = not has_gpu and not holds_all
    may_cache = may_cache and memory.free_bytes >= form.disk_bytes * spec.num_experts
    cached = choices("page_cache", *((False, True) if may_cache else (False,)))
    misses = choices("miss", *(("copy", "cpu") if may_compute else ("auto",)))
    for linears, policy, predictor, page_cache, miss in product(
        kernels, kept, ahead, cached, misses
    ):
        setup = Setup(
            form=form,
            num_slots=slots,
            num_host_slots=host_slots,
            batch=batch,
            context_tokens=request.prompt_tokens + request.new_tokens // 2,
            policy=str(policy),
            reads_ahead=predictor != "off" and not holds_all,
            linears=bool(linears),
            page_cache=bool(page_cache) and may_cache,
            computes_misses=miss == "cpu",
        )
        micro = micro_batch(request, batch)
        step = model.step(setup)
        prefill = model.prefill_seconds(replace(setup, batch=micro), request.prompt_tokens)
        prefill *= batch / micro
        if request.goal == "latency":
            rate = batch / step.seconds
        else:
            rate = batch * request.new_tokens
            rate /= prefill + (request.new_tokens - 1) * step.seconds
        is_rounded = not form.is_lossless
        settings = Settings(
            batch=batch,
            micro_batch=micro,
            num_slots=slots,
            expert_memory=memory.expert_bytes,
            host_memory=memory.host_expert_bytes,
            expert_slots=form.name
            if form.name in ("packed", "unpacked") and spec.is_packed
            else "auto",
            expert_dtype=form.name if is_rounded else "auto",
            policy=str(policy),
            predictor=str(predictor),
            prefetch_layers=1 if setup.reads_ahead else 0,
            miss=str(miss),
            linears=bool(linears),
            page_cache=bool(page_cache),
            threads=request.hardware.cpu.physical_cores,
            wave_experts=min(slots, max(layer.num_experts for layer in spec.layers)),
            kv_place="gpu" if has_gpu else "cpu",
            kv_bytes=memory.kv_bytes,
        )
        yield Candidate(
            settings=settings,
            memory=memory,
            setup=setup,
            step=step,
            prefill_seconds=prefill,
            tokens_per_second=rate,
        )


def _bottleneck(request: PlanRequest, best: Candidate) -> str:
    """The lane of the phase in which most of the time goes."""
    decoding = (request.new_tokens - 1) * best.step.seconds
    if request.goal == "throughput" and best.prefill_seconds > decoding:
        return "prefill"
    return best.step.bottleneck.value


def _what_would_help(request: PlanRequest, best: Candidate) -> tuple[Remedy, ...]:
    """Changes after which the best plan is faster, the best change first."""
    found = []
    for change, changed in changes(request):
        try:
            rate = _ranked(changed)[0].tokens_per_second
        except (BudgetError, ConfigError):
            continue
        factor = rate / best.tokens_per_second
        if factor >= _LEAST_GAIN:
            found.append(Remedy(change=change, factor=factor, tokens_per_second=rate))
    return tuple(sorted(found, key=lambda remedy: -remedy.factor))


def _assumptions(request: PlanRequest, best: Candidate) -> tuple[str, ...]:
    curves = request.curves
    policy = best.settings.policy if best.settings.policy in curves else LRU
    found = [
        f"hit rates: {curves[policy].source if curves else 'prior, gpt-oss-20b'}",
        "tokens of a batch choose experts independently and uniformly",
        "lanes overlap within a layer and do not slow each other down",
        *request.spec.assumptions,
    ]
    if best.settings.page_cache:
        found.append("what is free stays free: the page cache keeps all experts' files there")
    if request.hardware.source == "datasheet":
        found.append("rates are a datasheet's, with 0.8 of its bandwidth and 0.6 of its arithmetic")
    if request.hardware.gpus:
        found.append("the GPU's path has never been timed: its software seconds are a guess")
    return tuple(found)
