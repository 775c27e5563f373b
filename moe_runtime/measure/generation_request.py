"""What a generation is asked for, and the model that it asks for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from moe_runtime.integrations.transformers.resolve import ResolvedModel
from moe_runtime.measure.decoding import Decoding
from moe_runtime.measure.planned_load import OFF, load


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """What to run, and in how much memory; the arguments of `load()` mean what they mean there.

    With `report`, the file of a page, the run is recorded; with `hardware`, a file of rates, what
    it should have taken is predicted, too.
    """

    model: str
    prompts: Sequence[str]
    decoding: Decoding
    expert_memory: str = "auto"
    host_memory: str = "auto"
    miss: str = "auto"
    policy: str = "lru"
    predictor: str = "off"
    warm_start: bool = True
    expert_slots: str = "auto"
    expert_dtype: str = "auto"
    page_cache: bool = False
    exact: bool = False
    linears: bool = False
    max_memory: Mapping[int | str, int | str] | None = None
    dtype: str = "auto"
    device: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    chat: bool = False
    check: bool = False
    placement: str | None = None
    dispatch: str | None = None
    payload: str = "exact"
    pipeline: int | str = 1
    attention: str | None = None
    tables: str | None = None
    migrate: str | None = None  # a placement to go over to ...
    migrate_after: int = 0  # ... behind so many forwards
    timeout_seconds: float | None = None
    plan: str = OFF
    explicit: tuple[str, ...] = ()  # fields that were given and that a plan must leave as they are
    report: str | None = None
    hardware: str | None = None

    @property
    def is_parallel(self) -> bool:
        """Whether ranks are to share the experts."""
        options = (self.placement, self.dispatch, self.attention, self.tables)
        return any(option is not None for option in options)


def load_requested(request: GenerationRequest, resolved: ResolvedModel) -> PreTrainedModel:
    """The model as the request wants it."""
    arguments = {
        "expert_memory": request.expert_memory,
        "host_memory": request.host_memory,
        "miss": request.miss,
        "policy": request.policy,
        "predictor": request.predictor,
        "warm_start": request.warm_start,
        "expert_slots": request.expert_slots,
        "expert_dtype": request.expert_dtype,
        "page_cache": request.page_cache,
        "exact": request.exact,
        "linears": request.linears,
        "max_memory": request.max_memory,
        "device_map": request.device,
        "placement": request.placement,
        "dispatch": request.dispatch,
        "attention": request.attention,
        "tables": request.tables,
        "payload": request.payload,
        "pipeline": request.pipeline,
        "timeout_seconds": request.timeout_seconds,
        "trust_remote_code": request.trust_remote_code,
        "dtype": request.dtype,
    }
    if request.plan != OFF:
        names = {"device_map" if name == "device" else name for name in request.explicit}
        arguments = {name: value for name, value in arguments.items() if name in names}
    return load(resolved.folder, plan=request.plan, **arguments)
