"""Passes whose sequences run as two groups that take turns, where that is faster."""

import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from moe_runtime.offline.engine import Forward
from moe_runtime.offline.group_choice import GroupChoice
from moe_runtime.offline.group_model import PassTimes
from moe_runtime.offline.group_threads import GroupThreads
from moe_runtime.offline.pass_groups import cut_in_two, num_keys
from moe_runtime.offline.pass_scheduler import PassPlan
from moe_runtime.offline.turns import StoppedError, Turns
from moe_runtime.offline.weight_reads import WeightReads

# Runs the attention of one layer and returns what it returns.
Attend = Callable[[Callable[[], torch.Tensor]], torch.Tensor]


class GroupForward(Forward, Protocol):
    """A forward that can run a part of a pass, and leaves attention to whoever asks for it."""

    @property
    def attention_seconds(self) -> float:
        """Time spent in attention so far."""

    def passing(self) -> AbstractContextManager[None]:
        """Entered while groups of a pass run."""

    def run_group(self, plan: PassPlan, attend: Attend) -> torch.Tensor:
        """As `run`, calling `attend` with the attention of each layer. Any thread may call."""


class GroupedForward:
    """MoE-Lens' VSLPipe (arXiv 2504.09345, section 5), on a processor alone.

    While one group attends, the other multiplies.
    Each group runs the model's own forward in a thread of its own, and `Turns` lets one of them at
    a time do anything but attend: experts and their cache are used by one thread at a time.
    `on_turn` hears before each turn how many groups have theirs in the same layer still to come.
    Interrupted, or where one group fails, both end before `run` does.
    """

    def __init__(
        self,
        forward: GroupForward,
        choice: GroupChoice,
        *,
        weights: WeightReads,
        on_turn: Callable[[int], None],
    ) -> None:
        self.choice = choice
        self._forward = forward
        self._weights = weights
        self._on_turn = on_turn
        self._threads: GroupThreads | None = None

    def run(self, plan: PassPlan) -> torch.Tensor:
        groups = cut_in_two(plan)
        if groups is None:
            return self._forward.run(plan)
        num_groups = self.choice.num_groups
        forward = self._forward
        threads = self._threads_for_pass() if num_groups == 2 else None
        started = time.perf_counter()
        attention_seconds, stall_seconds = forward.attention_seconds, self._weights.stall_seconds
        if threads is None:
            logits = forward.run(plan)
        else:
            logits = self._run_groups(plan, groups, threads)
        self.choice.add(
            PassTimes(
                num_groups=num_groups,
                num_tokens=plan.num_tokens,
                num_keys=num_keys(plan),
                seconds=time.perf_counter() - started,
                attention_seconds=forward.attention_seconds - attention_seconds,
                stall_seconds=self._weights.stall_seconds - stall_seconds,
            )
        )
        if self.choice.is_settled_on_one:
            self.close()
        return logits

    def close(self) -> None:
        """End the threads. Safe to call twice."""
        if self._threads is not None:
            self._threads.close()
            self._threads = None

    def _threads_for_pass(self) -> GroupThreads:
        shares = self.choice.shares
        threads = self._threads
        if threads is None or (threads.num_products, threads.num_attention) != shares:
            self.close()
            num_products, num_attention = shares
            threads = GroupThreads(num_products=num_products, num_attention=num_attention)
            self._threads = threads
        return threads

    def _run_groups(
        self, plan: PassPlan, groups: tuple[PassPlan, PassPlan], threads: GroupThreads
    ) -> torch.Tensor:
        turns = Turns()
        running: list[Future[torch.Tensor]] = []
        with self._forward.passing():
            try:
                for number, (thread, group) in enumerate(zip(threads.groups, groups, strict=True)):
                    running.append(thread.submit(self._run_group, number, group, turns, threads))
                wait(running)
            except BaseException:  # Ctrl-C: neither group may go on behind the caller's back
                turns.stop()
                wait(running)
                raise
            finally:
                self._on_turn(0)
        errors = [error for one in running if (error := one.exception()) is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, StoppedError)):
            raise error
        sequences = groups[0].sequences + groups[1].sequences
        rows = {sequence: row for row, sequence in enumerate(sequences)}
        logits = torch.cat([one.result() for one in running])
        return logits[[rows[sequence] for sequence in plan.sequences]]

    def _run_group(
        self, number: int, plan: PassPlan, turns: Turns, threads: GroupThreads
    ) -> torch.Tensor:
        def take_turn() -> None:
            self._on_turn(1 if number == 0 and turns.is_running(1) else 0)

        def attend(attention: Callable[[], torch.Tensor]) -> torch.Tensor:
            with turns.attending(number):
                out = threads.attention.submit(attention).result()
            take_turn()
            return out

        try:
            turns.begin(number)
            take_turn()
            return self._forward.run_group(plan, attend)
        except BaseException:
            turns.stop()
            raise
        finally:
            turns.end(number)
