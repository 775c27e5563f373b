"""Run Mixture-of-Experts language models whose experts do not fit on the device."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_runtime.errors import MoERuntimeError as MoERuntimeError
    from moe_runtime.integrations.deepspeed import from_deepspeed as from_deepspeed
    from moe_runtime.integrations.transformers.generate_batches import (
        generate_batches as generate_batches,
    )
    from moe_runtime.integrations.transformers.handle import Handle as Handle
    from moe_runtime.integrations.transformers.handle import handle as handle
    from moe_runtime.integrations.transformers.linears import speed_up_linears as speed_up_linears
    from moe_runtime.integrations.transformers.offload import offload as offload
    from moe_runtime.integrations.transformers.register import register as register
    from moe_runtime.measure.planned_load import load as load

__version__ = "0.1.0"

# Public name -> the file that owns it. Resolved on first use (PEP 562): importing is free.
_OWNERS = {
    "Handle": "moe_runtime.integrations.transformers.handle",
    "MoERuntimeError": "moe_runtime.errors",
    "from_deepspeed": "moe_runtime.integrations.deepspeed",
    "generate_batches": "moe_runtime.integrations.transformers.generate_batches",
    "handle": "moe_runtime.integrations.transformers.handle",
    "load": "moe_runtime.measure.planned_load",
    "offload": "moe_runtime.integrations.transformers.offload",
    "register": "moe_runtime.integrations.transformers.register",
    "speed_up_linears": "moe_runtime.integrations.transformers.linears",
}

__all__ = [
    "Handle",
    "MoERuntimeError",
    "__version__",
    "from_deepspeed",
    "generate_batches",
    "handle",
    "load",
    "offload",
    "register",
    "speed_up_linears",
]


def __getattr__(name: str) -> Any:
    if name not in _OWNERS:
        raise AttributeError(f"module 'moe_runtime' has no attribute {name!r}")
    return getattr(import_module(_OWNERS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
