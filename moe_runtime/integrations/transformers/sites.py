"""Places of a model that hold experts."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

# What `use_experts_implementation` sets on an experts module (transformers 5).
_FUSED_MARKS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate")
_TOP_K_NAMES = (
    "top_k", "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k",
    "top_k_experts", "num_selected_experts",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ExpertParameter:
    """One parameter of every expert of a site; `shape` is one expert's."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool


@dataclass(frozen=True, slots=True)
class ExpertSite:
    """A module whose experts can be offloaded.

    Fused: parameters `[E, ...]` of one module, as transformers 5 builds them. Listed: a ModuleList
    with one module an expert, as remote code and home-made models do.
    """

    name: str
    module: nn.Module
    is_fused: bool
    num_experts: int
    top_k: int
    parameters: tuple[ExpertParameter, ...]

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's parameters."""
        return sum(math.prod(p.shape) * p.dtype.itemsize for p in self.parameters)

    def tensor_names(self, parameter: str) -> list[str]:
        """Full names of the tensors behind `parameter`: one fused, or one an expert."""
        prefix = f"{self.name}." if self.name else ""
        if self.is_fused:
            return [prefix + parameter]
        return [f"{prefix}{expert}.{parameter}" for expert in range(self.num_experts)]


def find_sites(root: nn.Module) -> list[ExpertSite]:
    """Every site below (or at) `root`, in module order: site `i` is MoE layer `i`."""
    sites = []
    parents = {
        f"{name}.{child}" if name else child: module
        for name, module in root.named_modules()
        for child, _ in module.named_children()
    }
    for name, module in root.named_modules():
        if _is_fused(module):
            sites.append(_fused_site(name, module, _top_k(parents.get(name), root)))
        elif _is_listed(module, is_root=module is root, name=name):
            sites.append(_listed_site(name, module, _top_k(parents.get(name), root)))
    return sites


def _is_fused(module: nn.Module) -> bool:
    return all(hasattr(module, mark) for mark in _FUSED_MARKS) and any(
        parameter.dim() >= 2 for parameter in module.parameters(recurse=False)
    )


def _is_listed(module: nn.Module, *, is_root: bool, name: str) -> bool:
    """A ModuleList of alike modules, given itself or called `experts`."""
    if not isinstance(module, nn.ModuleList) or len(module) < 2:
        return False
    if not is_root and name.rpartition(".")[2] != "experts":
        return False
    if _holds_experts(module[0]):  # a list of decoder layers, say: its experts are further in
        return False
    kinds = {(type(child), tuple(_shapes(child))) for child in module}
    return len(kinds) == 1 and any(_shapes(module[0]))


def _holds_experts(module: nn.Module) -> bool:
    return any(
        _is_fused(inner) or _is_listed(inner, is_root=False, name=name)
        for name, inner in module.named_modules()
    )


def _shapes(module: nn.Module) -> Iterator[tuple[str, tuple[int, ...], torch.dtype, bool]]:
    for name, parameter in module.named_parameters():
        yield name, tuple(parameter.shape), parameter.dtype, parameter.requires_grad


def _fused_site(name: str, module: nn.Module, top_k: int) -> ExpertSite:
    parameters = dict(module.named_parameters(recurse=False))
    num_experts = next(iter(parameters.values())).shape[0]
    return ExpertSite(
        name, module, True, num_experts, min(top_k, num_experts),
        tuple(
            ExpertParameter(key, tuple(value.shape[1:]), value.dtype, value.requires_grad)
            for key, value in parameters.items()
            if value.shape[0] == num_experts
        ),
    )  # fmt: skip


def _listed_site(name: str, module: nn.ModuleList, top_k: int) -> ExpertSite:
    parameters = tuple(ExpertParameter(*shape) for shape in _shapes(module[0]))
    return ExpertSite(name, module, False, len(module), min(top_k, len(module)), parameters)


def _top_k(block: nn.Module | None, root: nn.Module) -> int:
    """Experts a token uses: asked of the block around the experts, its router, then the config."""
    owners: list[object] = []
    if block is not None:
        owners += [block, *block.children()]
    owners.append(getattr(block, "config", None))
    config = getattr(root, "config", None)
    if config is not None:
        owners += [config.get_text_config(), config]
    for owner in owners:
        for name in _TOP_K_NAMES:
            value = getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return 1


def set_parameters(site: ExpertSite, tensors: dict[str, torch.Tensor]) -> None:
    """Give the module of `site` its experts back: `[E, ...]` of each parameter, by name."""
    for parameter in site.parameters:
        values = tensors[parameter.name]
        if site.is_fused:
            site.module.register_parameter(
                parameter.name, nn.Parameter(values, requires_grad=parameter.requires_grad)
            )
            continue
        path, _, attribute = parameter.name.rpartition(".")
        for expert, module in enumerate(site.module.children()):
            owner = module.get_submodule(path)
            owner._parameters[attribute] = nn.Parameter(
                values[expert].clone(), requires_grad=parameter.requires_grad
            )
