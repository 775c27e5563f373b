"""Offloads the experts of a model that is already in memory."""

import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from moe_runtime.cache.policy import EvictionPolicy
from moe_runtime.errors import UnsupportedModelError
from moe_runtime.expert_memory import ExpertMemory
from moe_runtime.integrations.transformers.budget import (
    device_available_bytes,
    plan_budget,
    slot_kinds,
)
from moe_runtime.integrations.transformers.choice import choose_maths
from moe_runtime.integrations.transformers.device import has_tiers
from moe_runtime.integrations.transformers.device_tiers import TierSettings
from moe_runtime.integrations.transformers.handle import Handle, refuse_twice
from moe_runtime.integrations.transformers.install import (
    build_tensor_map,
    check_policy,
    dense_bytes_of,
    install,
)
from moe_runtime.integrations.transformers.sites import ExpertSite, find_sites
from moe_runtime.memory.assembly import Assembly
from moe_runtime.memory.layout import ALIGNMENT_BYTES, TORCH_DTYPES
from moe_runtime.memory.safetensors_header import read_header


def offload(
    module: nn.Module,
    expert_memory: str | int | float = "auto",
    *,
    host_memory: str | int | float = "auto",
    miss: str = "auto",
    policy: str | EvictionPolicy = "lru",
    page_cache: bool = False,
    exact: bool = False,
    offload_folder: str | Path | None = None,
) -> Handle:
    """Move the experts of `module` to disk and read them back when a token needs them.

    `module` is a model, or any module, that holds experts of transformers 5 or ModuleLists of alike
    modules called `experts`; or such a ModuleList itself. The experts are written once to a new
    folder below `offload_folder` (default: the system's temporary folder, which must be on disk to
    save memory), and removed from there when the handle is restored or closed. `exact` and,
    for a model on a GPU, `host_memory` and `miss` are those of load().

    Every change is undone by `restore()`, or by using the handle in a `with`. Raises
    UnsupportedModelError when there is nothing to offload, BudgetError below the floor.
    """
    check_policy(policy)
    memory = ExpertMemory.parse(expert_memory)
    tiers = TierSettings.parse(host_memory, miss, may_shrink=memory == ExpertMemory(), exact=exact)
    refuse_twice(module)
    sites = find_sites(module)
    if not sites:
        raise UnsupportedModelError(
            f"{type(module).__name__} holds no experts that moe_runtime can offload: neither a "
            "fused experts module of transformers 5 nor a ModuleList of alike modules called "
            "'experts'"
        )
    devices = {p.device for site in sites for p in site.module.parameters()}
    if len(devices) != 1:
        raise UnsupportedModelError(
            f"the experts are on several devices ({', '.join(sorted(map(str, devices)))}); "
            "offload() takes a model on one device"
        )
    device = devices.pop()
    supported = set(TORCH_DTYPES.values())
    for site in sites:
        for parameter in site.parameters:
            if parameter.dtype not in supported:
                raise UnsupportedModelError(
                    f"{site.name}.{parameter.name} is {parameter.dtype}, which is not supported; "
                    "experts must be bfloat16, float16, float32 or float64"
                )
    folder = Path(tempfile.mkdtemp(prefix="moe-runtime-", dir=offload_folder))
    try:
        return _offload_to(folder, module, sites, memory, tiers, policy, page_cache, exact, device)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _offload_to(
    folder: Path,
    module: nn.Module,
    sites: list[ExpertSite],
    memory: ExpertMemory,
    tiers: TierSettings,
    policy: str | EvictionPolicy,
    page_cache: bool,
    exact: bool,
    device: torch.device,
) -> Handle:
    dense_bytes = dense_bytes_of(module, sites)
    places = _spill(module, sites, folder)
    dtypes = {name: module.get_parameter(name).dtype for name in places}
    phases = {name: module.get_parameter(name).data_ptr() % ALIGNMENT_BYTES for name in places}
    tensor_map = build_tensor_map(sites, places, dtypes, phases)
    if has_tiers(device):
        tensor_map = tensor_map.on_cache_lines()
    budget = plan_budget(
        memory,
        tensor_map,
        sites,
        slot_kinds(tensor_map, computes_compact=False),
        dense_bytes=0,  # already in memory
        available_bytes=device_available_bytes(device) + tensor_map.total_bytes,
    )
    maths = choose_maths(sites, dtypes, device, exact=exact)
    return install(
        module,
        sites,
        maths,
        tensor_map,
        budget,
        policy=policy,
        tiers=tiers,
        device=device,
        direct=not page_cache,
        dense_bytes=dense_bytes,
        spill_folder=folder,
    )


def _spill(root: nn.Module, sites: list[ExpertSite], folder: Path) -> dict[str, Assembly]:
    """Write each site to a file of its own; full tensor name -> its place."""
    places: dict[str, Assembly] = {}
    for index, site in enumerate(sites):
        tensors: dict[str, torch.Tensor] = {}
        for parameter in site.parameters:
            for name in site.tensor_names(parameter.name):
                value = root.get_parameter(name).detach()
                tensors[name] = value.cpu().contiguous()
        file = folder / f"experts-{index:05d}.safetensors"
        save_file(tensors, file)
        places |= {name: Assembly.of(tensor) for name, tensor in read_header(file).items()}
    return places
