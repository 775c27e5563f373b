"""One residency with one routing: from contestants to a table."""

from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch

from moe_runtime.errors import ContestantError
from moe_runtime.measure.bench.contestant_process import ContestantProcess, Turn
from moe_runtime.measure.bench.gate import Gate, compare_logits
from moe_runtime.measure.bench.job import Job
from moe_runtime.measure.bench.lineup import line_up
from moe_runtime.measure.bench.memory_group import MemoryGroups
from moe_runtime.measure.bench.prediction import simulated_counts
from moe_runtime.measure.bench.report import Caps, Prediction, Row, Table
from moe_runtime.measure.bench.rounds import Lane, Measured, Schedule
from moe_runtime.measure.bench.routing import Routing
from moe_runtime.measure.bench.settings import Progress, Settings
from moe_runtime.measure.bench.sitting import Seat, Sitting
from moe_runtime.measure.bench.table import ceiling_of, failed_row, mean_ms, measured_row
from moe_runtime.measure.inspection import Inspection
from moe_runtime.measure.peers.catalog import OURS
from moe_runtime.measure.spread import Spread
from moe_runtime.trace import Trace

_REFERENCE_VARIANT = "eager"
_NO_EXPERTS = "no_experts"
# What a step takes on a GPU that lacks no expert: the reference, in its fastest way.
_RESIDENT = "resident"
_RESIDENT_VARIANT = "grouped_mm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One table, and our time and the predicted one for comparisons between routings."""

    table: Table
    ours_ms: float | None
    predicted_ms: float | None


class OneTable:
    """Who takes part and which rows they replay; turns are taken elsewhere, between two calls.

    `start` loads everybody and returns their lanes; `finish` makes the table of what the lanes did.
    So several tables can take turns with each other.
    """

    def __init__(
        self,
        settings: Settings,
        inspection: Inspection,
        residency: float,
        routing: Routing,
        progress: Progress,
    ) -> None:
        self._sitting: Sitting | None = None
        self._gates: dict[str, Gate] = {}
        self._num_gate_tokens = 0
        self._caps = Caps.NOT_NEEDED
        self._settings = settings
        self._inspection = inspection
        self._residency = residency
        self._routing = routing
        self._progress = progress
        self._lineup = line_up(
            settings.peers, residency=residency, routing=routing, no_gguf=settings.no_gguf
        )

    @property
    def num_lanes(self) -> int:
        """How many take turns if all of them can."""
        num_own = 1 if self._is_on_cpu else 2  # of the reference
        return num_own + sum(len(one.variants) for one in self._lineup.starting)

    def start(
        self, stack: ExitStack, groups: MemoryGroups | None, schedule: Schedule
    ) -> list[Lane]:
        """Load everybody and compare their outputs; lanes of those that compute the same.

        `stack` ends their processes.
        """
        self._schedule = schedule
        self._rows = self._routing.rows(
            num_rows=schedule.num_rounds * schedule.tokens_per_round,
            num_layers=self._inspection.num_moe_layers,
            num_experts=self._inspection.experts_per_layer,
            top_k=self._inspection.top_k,
        )
        weight_bytes = int(self._residency * self._inspection.checkpoint_bytes)
        if self._residency < 1 and self._is_on_cpu:
            self._caps = Caps.IMPOSSIBLE if groups is None else Caps.ENFORCED
        elif self._residency < 1:
            self._caps = Caps.ENFORCED  # by each contestant's allocator
        sitting = self._sitting = stack.enter_context(
            Sitting(
                self._job(),
                self._rows,
                groups,
                weight_bytes=None if self._residency >= 1 else weight_bytes,
                equal_totals=self._settings.equal_totals,
                on_stage=self._say,
            )
        )
        sitting.start(self._lineup.starting)
        self._say("comparing outputs")
        self._compare_outputs(sitting)
        lanes = [
            self._lane(seat.contestant.row_name(variant), seat.process, variant)
            for seat in sitting.seats.values()
            for variant in seat.contestant.variants
            if self._gates[seat.contestant.row_name(variant)].is_green
        ]
        lanes.append(self._lane(_NO_EXPERTS, sitting.reference, _NO_EXPERTS))
        if not self._is_on_cpu:
            lanes.append(self._lane(_RESIDENT, sitting.reference, _RESIDENT_VARIANT))
        return lanes

    @property
    def _is_on_cpu(self) -> bool:
        return self._settings.device.type == "cpu"

    def _lane(self, name: str, process: ContestantProcess, variant: str) -> Lane:
        return Lane(
            name=self._lane_name(name),
            process=process,
            variant=variant,
            reads_disk=self._is_on_cpu and self._residency < 1 and name != _NO_EXPERTS,
            is_rated=self._residency < 1 and name == OURS.name,
        )

    def _lane_name(self, row: str) -> str:
        return f"{self._routing.name}/{row}"

    def _job(self) -> Job:
        return Job(
            checkpoint=self._settings.checkpoint.resolve(),
            gguf=None if self._settings.gguf is None else self._settings.gguf.resolve(),
            scratch=self._settings.work_folder.resolve(),
            replay=None,
            device=str(self._settings.device),
            dtype=self._inspection.dtype,
            policy=self._settings.policy,
            predictor=self._settings.predictor,
            exact=self._settings.exact,
            num_threads=torch.get_num_threads(),
            memory_bytes=None,
            context_tokens=max(64, self._schedule.tokens_per_round),
        )

    def finish(self, measured: Measured) -> Found:
        """The table, of the lanes that `start` returned."""
        sitting, schedule = self._sitting, self._schedule
        assert sitting is not None, "start() comes first"
        measured = measured.part(self._lane_name(""))
        for name in (_NO_EXPERTS, _RESIDENT):
            if name in measured.failures:
                raise measured.failures[name]
        counted = {name: turns[schedule.first_counted :] for name, turns in measured.turns.items()}
        rows = self._rows_of(sitting, measured, counted)
        ours, seat = measured.turns.get(OURS.name), sitting.seats.get(OURS.name)
        ceiling, prediction = None, None
        rates = measured.rates_gbps.get(OURS.name, [])[schedule.first_counted :]
        if ours is not None and seat is not None:
            if rates:
                ceiling = ceiling_of(
                    counted[OURS.name],
                    counted[_NO_EXPERTS if self._is_on_cpu else _RESIDENT],
                    rates,
                    slot_bytes=seat.facts["slot_bytes"],
                )
            prediction = self._prediction(ours, seat, mean_ms(counted[_NO_EXPERTS]), rates)
        rate = Spread.of(rates) if rates else None
        table = Table(
            residency=self._residency,
            routing=self._routing.name,
            totals="equal" if self._settings.equal_totals else "weights",
            caps=self._caps,
            weight_bytes=int(min(self._residency, 1.0) * self._inspection.checkpoint_bytes),
            rows=rows,
            no_experts_ms=Spread.of([turn.mean_ms for turn in counted[_NO_EXPERTS]]),
            device=str(self._settings.device),
            resident_ms=self._spread(counted, _RESIDENT),
            direct_read_gbps=rate if self._is_on_cpu else None,
            direct_reads=measured.rate_settings if self._is_on_cpu else [],
            link_gbps=None if self._is_on_cpu else rate,
            ceiling=ceiling,
            prediction=prediction,
            num_rounds=schedule.num_rounds,
            tokens_per_round=schedule.tokens_per_round,
            other_cores=measured.other_cores,
        )
        return Found(
            table=table,
            ours_ms=mean_ms(counted[OURS.name]) if ours is not None else None,
            predicted_ms=None if prediction is None else prediction.ms_per_token,
        )

    def _compare_outputs(self, sitting: Sitting) -> None:
        """Every row's gate, on the first round's tokens."""
        tokens = self._schedule.rounds[0]
        expected, _ = sitting.logits(sitting.reference, _REFERENCE_VARIANT, tokens, 0)
        for name, seat in list(sitting.seats.items()):
            for variant in seat.contestant.variants:
                try:
                    found, count = sitting.logits(seat.process, variant, tokens, 0)
                except ContestantError as error:
                    sitting.fail(name, error)
                    break
                self._gates[seat.contestant.row_name(variant)] = compare_logits(
                    found, expected, tolerance=self._tolerance(seat)
                )
                if name == OURS.name:
                    self._num_gate_tokens = count

    def _tolerance(self, seat: Seat) -> float:
        """What the gate asks for: equal bits of our exact path."""
        is_exact = self._settings.exact and seat.contestant is OURS
        return 0.0 if is_exact else seat.contestant.tolerance

    def _rows_of(
        self,
        sitting: Sitting,
        measured: Measured,
        counted: dict[str, list[Turn]],
    ) -> list[Row]:
        rows = []
        for contestant in self._lineup.starting:
            seat = sitting.seats.get(contestant.name)
            if seat is None:
                rows.append(failed_row(contestant, sitting.failures[contestant.name]))
                continue
            for variant in contestant.variants:
                name = contestant.row_name(variant)
                if name in measured.failures:
                    rows.append(failed_row(contestant, measured.failures[name]))
                    continue
                rows.append(
                    measured_row(
                        seat,
                        variant,
                        counted.get(name, []),
                        self._gates[name],
                        counted.get(OURS.name),
                        may_compare=self._caps is not Caps.IMPOSSIBLE,
                    )
                )
        return rows + self._lineup.absent

    def _prediction(
        self,
        ours: list[Turn],
        seat: Seat,
        no_experts_ms: float,
        rates_gbps: list[float],
    ) -> Prediction | None:
        rows: Trace | None = self._rows
        # Reads ahead depend on time, and the simulator's counts are of demand alone; on a GPU a
        # miss may go to the CPU, which no simulator plays.
        is_counted = self._is_on_cpu and self._settings.predictor == "off"
        if rows is None or self._residency >= 1 or not is_counted:
            return None
        hits, misses = simulated_counts(
            rows,
            ours,
            self._schedule,
            num_gate_tokens=self._num_gate_tokens,
            num_layers=self._inspection.num_moe_layers,
            slots=seat.facts["slots"],
            policy=seat.facts["policy"],
        )
        num_tokens = sum(turn.num_tokens for turn in ours[self._schedule.first_counted :])
        missed_bytes = misses * seat.facts["slot_bytes"] / num_tokens
        ms_per_byte = float(np.mean([1e-6 / rate for rate in rates_gbps])) if rates_gbps else None
        return Prediction(
            hit_rate=hits / (hits + misses),
            ms_per_token=(
                None if ms_per_byte is None else missed_bytes * ms_per_byte + no_experts_ms
            ),
        )

    @staticmethod
    def _spread(counted: dict[str, list[Turn]], name: str) -> Spread | None:
        turns = counted.get(name)
        return None if turns is None else Spread.of([turn.mean_ms for turn in turns])

    def _say(self, stage: str) -> None:
        share = f"{100 * self._residency:g}%"
        self._progress.on_stage(f"{share}, {self._routing.name} routing: {stage}")
