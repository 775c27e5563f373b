"""Checks of what is installed: interpreter, packages, and the code that computes."""

import importlib.metadata
import platform
import re

from moe_runtime import __version__
from moe_runtime.kernels.cpu.attention_status import attention_status
from moe_runtime.kernels.cpu.dequant_status import dequant_status
from moe_runtime.kernels.cpu.experts_status import experts_status
from moe_runtime.kernels.cpu.gemv_status import gemv_status
from moe_runtime.kernels.cpu.unpack_status import unpack_status
from moe_runtime.measure.check import Check, Status
from moe_runtime.placement.anneal_status import anneal_status

# What every model needs, with the least version (tests compare this with pyproject.toml).
REQUIRED = {
    "torch": "2.11",
    "transformers": "5.17",
    "safetensors": "",
    "tokenizers": "",
    "huggingface_hub": "",
    "numpy": "",
    "PyYAML": "",
}
# Imported only by what uses them.
OPTIONAL = (
    "triton",
    "scipy",
    "pulp",
    "highspy",
    "matplotlib",
    "accelerate",
    "deepspeed",
    "llama-cpp-python",
    "gguf",
    "kernels",
)


def check_python() -> Check:
    """The interpreter, and which moe_runtime it runs."""
    version = platform.python_version()
    return Check(
        name="python",
        status=Status.OK,
        finding=f"Python {version}, moe_runtime {__version__}",
        facts={"python": version, "moe_runtime": __version__},
    )


def check_packages() -> Check:
    """The packages that every model needs, by their installed metadata."""
    versions = {name: installed_version(name) for name in REQUIRED}
    wrong = [
        f"{name} {found or 'missing'}" + (f" (at least {REQUIRED[name]})" if REQUIRED[name] else "")
        for name, found in versions.items()
        if found is None or _as_numbers(found) < _as_numbers(REQUIRED[name])
    ]
    facts: dict[str, object] = dict(versions)
    if wrong:
        wanted = " ".join(
            f"'{name}>={REQUIRED[name]}'" if REQUIRED[name] else name
            for name in (entry.split()[0] for entry in wrong)
        )
        return Check(
            name="packages",
            status=Status.FAIL,
            finding=", ".join(wrong),
            remedy=f"pip install --upgrade {wanted}",
            facts=facts,
        )
    finding = ", ".join(f"{name} {version}" for name, version in versions.items())
    return Check(name="packages", status=Status.OK, finding=finding, facts=facts)


def check_kernels() -> Check:
    """Which code computes: a C kernel for one-token bf16 experts on the CPU, torch for the rest."""
    try:
        import torch
    except Exception as error:  # a broken installation fails in many ways, and this is the place
        return Check(
            name="kernels",
            status=Status.FAIL,
            finding=f"torch does not import: {error}",
            remedy="pip install --force-reinstall torch",
        )
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    experts, one_token_bf16 = experts_status(), gemv_status()
    facts: dict[str, object] = {
        "active": experts.partition(" ")[0],
        "experts_bf16": experts,
        "one_token_bf16": one_token_bf16,
        "decode_attention": attention_status(),
        "placement_search": anneal_status(),
        "unpack": unpack_status(),
        "dequant": dequant_status(),
        "devices": devices,
        "threads": torch.get_num_threads(),
    }
    finding = (
        f"torch on {' and '.join(devices)}, {torch.get_num_threads()} threads; "
        f"bf16 experts on the CPU: {experts}; with --exact, one token at a time: {one_token_bf16}; "
        f"placement search: {anneal_status()}; packed experts: {unpack_status()}; "
        f"fp8 and mxfp4 experts: {dequant_status()}; "
        f"attention of batch: {attention_status()}"
    )
    return Check(name="kernels", status=Status.OK, finding=finding, facts=facts)


def check_optional_packages() -> Check:
    """Packages that parts of the library use when they are there."""
    versions = {name: installed_version(name) for name in OPTIONAL}
    finding = ", ".join(f"{name} {version or 'absent'}" for name, version in versions.items())
    return Check(name="optional packages", status=Status.OK, finding=finding, facts=dict(versions))


def installed_version(distribution: str) -> str | None:
    """The version in the installed metadata; nothing is imported."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _as_numbers(version: str) -> tuple[int, ...]:
    """`2.13.0+cpu` -> (2, 13, 0); enough to compare release versions."""
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0]))
