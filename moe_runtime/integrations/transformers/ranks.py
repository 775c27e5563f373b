"""The ranks that load one model together: which experts each takes, and whether they agree."""

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from moe_runtime import __version__
from moe_runtime.errors import ParallelError, UnsupportedModelError
from moe_runtime.integrations.transformers.sites import ExpertSite
from moe_runtime.integrations.transformers.survey import Survey
from moe_runtime.layer import LayerMath
from moe_runtime.memory.checkpoint_digest import checkpoint_digest
from moe_runtime.parallel.degree import Degree, FittedDegree, FixedDegree
from moe_runtime.parallel.expert_parallel import ExpertParallel
from moe_runtime.parallel.make_dispatcher import ATTENTIONS, check_dispatch
from moe_runtime.parallel.payload import ExactPayload
from moe_runtime.parallel.plan import ExpertPlan, check_placement, linear_placement
from moe_runtime.parallel.world import World, check_agreement, started_ranks
from moe_runtime.perf.interconnect import Interconnect
from moe_runtime.placement.cocluster import DeviceTables
from moe_runtime.placement_map import Placement
from moe_runtime.tiered_math import TieredMath


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """What `load()` was told about expert parallelism, once this rank has met the others."""

    world: World
    placement: Placement | None
    dispatch: str
    payload: str
    pipeline: int | Interconnect
    attention: str
    tables: DeviceTables | None
    exact: bool

    @classmethod
    def join(
        cls,
        *,
        mesh: Any,
        placement: str | Path | Placement | None,
        dispatch: str | None,
        payload: str,
        pipeline: int | str | Path,
        attention: str | None,
        tables: str | Path | DeviceTables | None,
        timeout_seconds: float | None,
        device: torch.device,
        exact: bool,
        predictor: str | Path,
    ) -> "Ranks | None":
        """Meet the others if any option asks for it. Raises ParallelError and PlacementError."""
        given = {"payload": payload, "pipeline": pipeline}
        usual = {"payload": ExactPayload.name, "pipeline": 1}
        if all(option is None for option in (mesh, placement, dispatch, attention, tables)):
            if timeout_seconds is not None:
                raise ParallelError(
                    "timeout_seconds has no effect on one process; give mesh=, placement= or "
                    "dispatch= too"
                )
            for name, value in given.items():
                if value != usual[name]:
                    raise ParallelError(
                        f"{name}={value!r} has no effect on one process; give mesh=, placement= or "
                        "dispatch= too"
                    )
            return None
        dispatch, attention = _modes(dispatch, attention, has_tables=tables is not None)
        if exact and dispatch == "auto":
            dispatch = "alltoall"  # the one whose sums have an order
        check_dispatch(dispatch, payload)
        chunks = pipeline if isinstance(pipeline, int) else Interconnect.load(Path(pipeline))
        if isinstance(chunks, int) and chunks < 1:
            raise ValueError(f"pipeline is {chunks}; a layer runs in 1 chunk or more")
        if attention == "tensor" or dispatch in ("coherent", "speculative"):
            for name, value in given.items():
                if value != usual[name]:
                    raise ParallelError(
                        f"{name}={value!r} is of alltoall's messages, and dispatch {dispatch!r} "
                        f"with attention {attention!r} sends others; leave one of them out"
                    )
        if exact:
            _check_exact(dispatch, attention, given, usual, device)
        if predictor != "off":
            raise ParallelError(
                f"predictor={str(predictor)!r} reads ahead from all experts of the model, and a "
                "rank holds a part; leave out predictor, or mesh, placement and dispatch"
            )
        if placement is not None and not isinstance(placement, Placement):
            placement = Placement.load(placement)
        if tables is not None and not isinstance(tables, DeviceTables):
            tables = DeviceTables.load(tables)
        started = started_ranks()
        num_ranks = mesh.size() if mesh is not None else started
        if placement is not None and num_ranks is not None and placement.gpus != num_ranks:
            check_placement(
                placement,
                num_experts=placement.num_experts,
                num_layers=placement.num_layers,
                num_ranks=num_ranks,
                checkpoint=placement.checkpoint,
            )
        world = World.join(mesh, device=device, timeout_seconds=timeout_seconds)
        return cls(
            world=world,
            placement=placement,
            dispatch=dispatch,
            payload=payload,
            pipeline=chunks,
            attention=attention,
            tables=tables,
            exact=exact,
        )

    def share(self, found: Survey, folder: Path, settings: Mapping[str, object]) -> ExpertParallel:
        """This rank's part of the experts; compares every rank's model and `settings`; collective.

        `folder` is that of the model's weights.
        Raises PlacementError, ParallelError and UnsupportedModelError, and leaves the others then.
        """
        try:
            digest = checkpoint_digest(folder)
            check_agreement(self.world.ledger, self._facts(found, digest, settings))
            # A packed checkpoint has other bytes than the one that a placement was made for.
            plan = self._plan(found.sites, "" if found.tensor_map.is_packed else digest)
            return ExpertParallel(
                self.world,
                plan,
                self.dispatch,
                payload=self.payload,
                degree=self._degree(plan, found.sites[0]),
                network=None if isinstance(self.pipeline, int) else self.pipeline,
            )
        except BaseException:
            self.world.close(orderly=False)
            raise

    def _plan(self, sites: list[ExpertSite], checkpoint: str) -> ExpertPlan:
        sizes = sorted({site.num_experts for site in sites})
        if len(sizes) > 1:
            raise UnsupportedModelError(
                f"MoE layers have {sizes} experts; expert parallelism needs equally many in each"
            )
        world, placement = self.world, self.placement
        if placement is None:
            placement = linear_placement(
                model="",
                num_experts=sizes[0],
                num_layers=len(sites),
                num_ranks=world.num_ranks,
                num_nodes=world.ledger.num_nodes,
                checkpoint=checkpoint,
            )
        check_placement(
            placement,
            num_experts=sizes[0],
            num_layers=len(sites),
            num_ranks=world.num_ranks,
            checkpoint=checkpoint,
        )
        if world.rank == 0 and checkpoint and not placement.checkpoint:
            warnings.warn(
                "the placement does not say for which weights it was made, so it was compared with "
                "the model by shape alone; solve one from a trace of this version's `moe-runtime "
                "trace record` to have it checked",
                stacklevel=2,
            )
        placement = replace(placement, checkpoint=checkpoint)
        return ExpertPlan.of(placement, world.rank, is_steady=self.exact)

    def _degree(self, plan: ExpertPlan, site: ExpertSite) -> Degree:
        if isinstance(self.pipeline, int):
            return FixedDegree(self.pipeline)
        matrices = [p.shape for p in site.parameters if len(p.shape) > 1]
        return FittedDegree(
            interconnect=self.pipeline,
            dispatch=self.dispatch,
            num_ranks=plan.num_ranks,
            num_experts=plan.num_experts,
            expert_weights=sum(map(prod, matrices)),
        )

    def _facts(
        self, found: Survey, checkpoint: str, settings: Mapping[str, object]
    ) -> dict[str, str]:
        config = json.dumps(found.model.config.to_dict(), sort_keys=True, default=str)
        placement, tables = self.placement, self.tables
        slots = b"none" if placement is None else placement.slots.tobytes()
        nodes = 1 if placement is None else placement.nodes
        facts: dict[str, object] = {
            "moe_runtime version": __version__,
            "torch version": torch.__version__,
            "world size": started_ranks() or self.world.num_ranks,
            "model config": _digest(config.encode()),
            "checkpoint": checkpoint,
            "dtype": next(iter(found.dtypes.values())),
            "placement": _digest(slots + str(nodes).encode()),
            "dispatch": self.dispatch,
            "payload": self.payload,
            "pipeline": _digest(repr(self.pipeline).encode()),
            "attention": self.attention,
            "exactness": self.exact,
            "tables": _digest(b"none" if tables is None else _bytes_of(tables)),
        }
        return {name: str(value) for name, value in (facts | dict(settings)).items()}


def check_maths(sites: list[ExpertSite], maths: list[LayerMath | TieredMath | None]) -> None:
    """Raise UnsupportedModelError where experts cannot be computed apart from their module."""
    for site, math in zip(sites, maths, strict=True):
        if not site.is_fused or math is None:
            raise UnsupportedModelError(
                f"{site.name} runs a forward of its own, which asks for every expert that a token "
                "uses; expert parallelism needs experts of transformers' common interface "
                "(docs/families.md): leave out mesh, placement and dispatch"
            )


def _modes(dispatch: str | None, attention: str | None, *, has_tables: bool) -> tuple[str, str]:
    """What was asked for, with what stands for nothing; raises ValueError and ParallelError."""
    attention = attention or ATTENTIONS[0]
    if attention not in ATTENTIONS:
        raise ValueError(f"attention {attention!r} is unknown; choose from {', '.join(ATTENTIONS)}")
    is_shared = attention == "tensor"
    dispatch = dispatch or ("speculative" if has_tables else "alltoall" if is_shared else "auto")
    if is_shared and dispatch not in ("alltoall", "speculative"):
        raise ParallelError(
            f"attention 'tensor' sums rows where their experts are, and dispatch {dispatch!r} "
            "moves them otherwise; choose alltoall, or speculative with tables"
        )
    if has_tables != (dispatch == "speculative"):
        raise ParallelError(
            "dispatch 'speculative' looks tokens up in tables, which no other does; give both "
            "dispatch='speculative' and tables=, as `placement solve --tables` writes them"
        )
    return dispatch, attention


def _check_exact(
    dispatch: str,
    attention: str,
    given: Mapping[str, object],
    usual: Mapping[str, object],
    device: torch.device,
) -> None:
    """Raise ParallelError where the bits of one process cannot be had."""
    reasons = {
        "allreduce": "a collective adds up in an order of its own",
        "hierarchical": "partial sums are added up on their way",
        "coherent": "attention runs with rows of other prompts in one product",
    }
    why = reasons.get(dispatch)
    if attention == "tensor":
        dispatch, why = "any with attention 'tensor'", "heads of several ranks are added up"
    for name, value in given.items():
        if value != usual[name]:
            dispatch, why = f"{name}={value!r}", "rows are rounded or computed in other numbers"
    if device.type != "cpu":
        dispatch, why = f"device {device}", "its products are not compared with one process's"
    if why is not None:
        raise ParallelError(
            f"exact=True promises the bits of one process, which {dispatch} cannot give: {why}; "
            "use dispatch alltoall (or speculative with attention data) on the CPU, or leave out "
            "exact"
        )


def _bytes_of(tables: DeviceTables) -> bytes:
    return b"".join(getattr(tables, field.name).tobytes() for field in fields(tables))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
