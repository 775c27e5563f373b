"""`load()` with a plan: settings are chosen for this machine, tried for a few steps, and kept."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from moe_runtime import warm_start
from moe_runtime.expert_memory import ExpertMemory
from moe_runtime.integrations.transformers.device import single_device
from moe_runtime.integrations.transformers.handle import handle
from moe_runtime.integrations.transformers.load import load as load_as_asked
from moe_runtime.integrations.transformers.resolve import resolve_model
from moe_runtime.integrations.transformers.spec_reader import spec_of_folder
from moe_runtime.measure.plan_trial import CONTEXT_TOKENS, Candidate, run_trials
from moe_runtime.measure.plan_verdict import Verdict, fingerprint_of, recall
from moe_runtime.measure.this_machine import this_machine
from moe_runtime.memory.checkpoint_digest import checkpoint_digest
from moe_runtime.model_spec import ModelSpec
from moe_runtime.perf.hardware import Hardware
from moe_runtime.perf.plan import PlanRequest
from moe_runtime.perf.planner import decode_rate, make_plan

OFF, AUTO = "off", "auto"
PLANS = (OFF, AUTO)

_PROMPT_TOKENS, _NEW_TOKENS = 512, 128
_MOST_PLANS = 2  # that are tried beside the defaults
# Settings that a plan chooses and a user may have fixed.
_CHOSEN = ("expert_slots", "expert_dtype", "policy", "predictor", "linears", "page_cache", "miss")
_RANKED = ("mesh", "placement", "dispatch")
_FOR_RESOLVING = (
    "revision", "subfolder", "token", "cache_dir", "local_files_only", "trust_remote_code",
)  # fmt: skip


def load(model: str | Path, *, plan: str = OFF, **arguments: Any) -> PreTrainedModel:
    """`moe_runtime.integrations.transformers.load.load`, and with plan='auto' its settings chosen.

    Takes the arguments of that function, and those that are given always win: the plan chooses
    among the others. It estimates every combination from the model's shapes and this machine's
    rates, then loads the best two and the defaults for a few decoding steps each, and keeps the
    fastest: never one that measured slower than the defaults. `handle(model).report()["plan"]`
    shows predicted beside measured. The verdict is kept where `warm_start` keeps its files, for
    this checkpoint, machine and arguments; another one is tried anew.

    Raises what that function raises, BudgetError with the smallest budget that works, and
    ValueError for several ranks, whose experts are placed and not cached.
    """
    if plan not in PLANS:
        raise ValueError(f"plan {plan!r} is unknown; choose from {', '.join(PLANS)}")
    if plan == OFF:
        return load_as_asked(model, **arguments)
    ranked = [name for name in _RANKED if arguments.get(name) is not None]
    if ranked:
        raise ValueError(
            f"plan='auto' is for one process and {ranked[0]} for several ranks; leave out one"
        )
    resolved = resolve_model(
        model, **{name: arguments[name] for name in _FOR_RESOLVING if name in arguments}
    )
    machine = _machine(resolved.folder, arguments)
    wishes = {name: value for name, value in arguments.items() if name != "warm_start"}
    folder = warm_start.state_folder(arguments.get("warm_start", True))
    digest = checkpoint_digest(resolved.folder, folder)
    fingerprint = fingerprint_of(digest, machine, wishes)
    path = (folder or warm_start.default_folder()) / f"plan-{digest}.json"
    available = machine.memory.available_bytes
    verdict = recall(path, fingerprint, available)
    if verdict is None:

        def load_once(**settings: Any) -> PreTrainedModel:
            return load_as_asked(resolved.folder, **_without_hub(arguments) | settings)

        candidates = _candidates(resolved.folder, machine, arguments)
        chosen, trials = run_trials(load_once, candidates)
        verdict = Verdict(
            fingerprint=fingerprint, available_bytes=available, chosen=chosen, trials=trials
        )
        if folder is not None:
            verdict.save(path)
    loaded = load_as_asked(model, **{**verdict.winner.arguments, **arguments})
    loaded_model = loaded[0] if isinstance(loaded, tuple) else loaded
    handle(loaded_model).plan = verdict.as_dict()
    return loaded


def _candidates(folder: Path, machine: Hardware, arguments: Mapping[str, Any]) -> list[Candidate]:
    """What to try, the defaults first; what the user gave is not in it."""
    spec = _spec(folder, arguments)
    context = spec.context_tokens
    new_tokens = min(_NEW_TOKENS, max(1, context // 4))
    request = PlanRequest(
        spec=spec,
        hardware=machine,
        prompt_tokens=min(_PROMPT_TOKENS, max(1, context // 2)),
        new_tokens=new_tokens,
        batch=1,
        expert_memory_bytes=_expert_bytes(spec, machine, arguments),
        is_exact=bool(arguments.get("exact", False)),
        fixed={name: arguments[name] for name in _CHOSEN if name in arguments},
    )
    plan = make_plan(request)
    has_gpu = bool(machine.gpus)
    found = [Candidate(arguments={})]
    for one in (plan.chosen, *plan.others):
        settings = one.settings.load_arguments(has_gpu=has_gpu)
        if one.settings.num_slots >= spec.num_experts:
            settings["expert_memory"] = "100%"
        if "max_memory" in arguments:
            settings.pop("expert_memory")
        settings = {name: value for name, value in settings.items() if name not in arguments}
        if all(settings != other.arguments for other in found):
            found.append(
                Candidate(
                    arguments=settings,
                    trial_tokens_per_second=decode_rate(request, one, CONTEXT_TOKENS),
                    planned_tokens_per_second=one.tokens_per_second,
                )
            )
    return found[: 1 + _MOST_PLANS]


def _spec(folder: Path, arguments: Mapping[str, Any]) -> ModelSpec:
    """In the dtype that was asked for."""
    spec = spec_of_folder(folder)
    dtype = str(arguments.get("dtype") or arguments.get("torch_dtype") or AUTO)
    dtype = dtype.removeprefix("torch.")
    if dtype == AUTO:
        return spec
    changed = replace(spec, value_bytes=4 if dtype == "float32" else 2)
    is_plain = spec.expert_format in ("bfloat16", "float16", "float32")
    return replace(changed, expert_format=dtype) if is_plain else changed


def _expert_bytes(spec: ModelSpec, machine: Hardware, arguments: Mapping[str, Any]) -> int | None:
    if "expert_memory" not in arguments:
        return None
    memory = ExpertMemory.parse(arguments["expert_memory"])
    if memory == ExpertMemory():
        return None
    return memory.resolve(
        expert_total_bytes=spec.expert_total_bytes,
        available_bytes=machine.memory.available_bytes,
    )


def _machine(folder: Path, arguments: Mapping[str, Any]) -> Hardware:
    """This one, without its GPUs where the model computes on the CPU."""
    machine = this_machine(folder, read_bytes=spec_of_folder(folder).expert_bytes)
    device = single_device(arguments.get("device_map"))
    if device.type == "cpu":
        return replace(machine, gpus=())
    if not machine.gpus:
        raise ValueError(
            f"plan='auto' knows no rates of {torch.cuda.get_device_name(device)}; leave plan out, "
            "or compute on the CPU"
        )
    return machine


def _without_hub(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """For loading from the folder that was found, for a trial."""
    dropped = ("revision", "subfolder", "cache_dir", "warm_start", "output_loading_info")
    return {name: value for name, value in arguments.items() if name not in dropped}
