"""Measures decode passes as one group and as two that take turns, and prints one JSON line a cell.

    python scripts/bench_token_groups.py --work DIR --sequences 64 256 --context 512 2048

The model is random, with OLMoE's shapes. Each cell's sequences hold as many keys and values as
given, written without a prompt being run and shared by all layers; passes of both kinds alternate,
each with tokens of its own. Compare shares, not seconds, across cells: the memory's rate changes
within minutes.
"""

import argparse
import itertools
import json
import random
import time
import warnings
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

import torch

from moe_runtime.cache.scan import ScanPolicy
from moe_runtime.integrations.transformers.handle import Handle, handle
from moe_runtime.integrations.transformers.load import load
from moe_runtime.integrations.transformers.paged_model import PagedModel
from moe_runtime.integrations.transformers.streamed_forward import (
    StreamedForward,
    turn_listener,
    why_one_group,
)
from moe_runtime.measure.bench.machine import git_commit
from moe_runtime.measure.bench.model import make_checkpoint
from moe_runtime.measure.processor import this_processor
from moe_runtime.offline.engine import Forward
from moe_runtime.offline.group_choice import GroupChoice
from moe_runtime.offline.group_model import GroupModel, PassTimes
from moe_runtime.offline.grouped_forward import GroupedForward
from moe_runtime.offline.page_table import pages_for
from moe_runtime.offline.pass_scheduler import PassPlan
from moe_runtime.offline.sequence import Sequence

VOCABULARY = range(100, 50000)
ANY_VALUE = 0.01  # of keys and values: what they are changes no time


def main() -> None:
    """Measure every cell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="where the checkpoint is, or goes")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--residency", default="100%")
    parser.add_argument("--sequences", type=int, nargs="+", default=[64])
    parser.add_argument("--context", type=int, nargs="+", default=[1024])
    parser.add_argument("--turns", type=int, default=7)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    folder, _ = make_checkpoint(
        "olmoe-1b-7b",
        arguments.work,
        num_layers=arguments.layers,
        routings=[],
        on_progress=lambda done, total: None,
    )
    policy = ScanPolicy()
    model = load(folder, expert_memory=arguments.residency, policy=policy, warm_start=False)
    with closing(handle(model)) as owner, PagedModel(model) as paged:
        assert not why_one_group(owner), why_one_group(owner)
        for num_sequences, context in itertools.product(arguments.sequences, arguments.context):
            found = measure(paged, owner, policy, num_sequences, context, arguments.turns)
            print(json.dumps(vars(arguments) | {"work": None} | found), flush=True)


def measure(
    paged: PagedModel,
    owner: Handle,
    policy: ScanPolicy,
    num_sequences: int,
    context: int,
    num_turns: int,
) -> dict[str, Any]:
    """One cell."""
    sequences = [
        Sequence(number=number, prompt_ids=[0] * context, max_new_tokens=1, written=[0])
        for number in range(num_sequences)
    ]
    pages = paged.open_pages(num_sequences * pages_for(context + 1))
    for one in sequences:
        pages.table.hold(one.number, one.num_tokens)
    # One store for all layers: as many bytes are read, and no cache holds it from one to the next.
    store = pages.layers[0]
    pages.layers[:] = [store] * len(pages.layers)
    for values in (store.key_BGdP, store.value_BGPv):
        values.fill_(ANY_VALUE)
    plan = PassPlan(decoding=tuple(sequences), prompts=())
    model = GroupModel(num_threads=torch.get_num_threads(), num_layers=len(pages.layers))
    choice = GroupChoice("2", model)
    draw = random.Random(0)
    on_turn = turn_listener(owner, policy)
    with closing(GroupedForward(paged, choice, weights=owner, on_turn=on_turn)) as grouped:
        kinds: dict[int, Forward] = {
            1: StreamedForward(paged, owner, policy),
            2: StreamedForward(grouped, owner, policy),
        }
        kinds[2].run(plan)  # in one group, which tells how to share the threads
        times: dict[int, list[PassTimes]] = {1: [], 2: []}
        for turn in range(num_turns + 1):
            for num_groups, forward in kinds.items():
                for one in sequences:
                    one.written[-1] = draw.choice(VOCABULARY)
                found = run_pass(paged, owner, forward, plan, num_groups)
                if turn:  # the first of each warms up
                    times[num_groups].append(found)
    ones, twos = times[1], times[2]
    ratios = [two.seconds / one.seconds for one, two in zip(ones, twos, strict=True)]
    return {
        "sequences": num_sequences,
        "context": context,
        "pass_kv_bytes": pages.table.num_pages * pages.page_bytes,
        "threads_products_attention": choice.shares,
        "one_seconds": median(one.seconds for one in ones),
        "one_attention_seconds": median(one.attention_seconds for one in ones),
        "one_products_seconds": median(one.products_seconds for one in ones),
        "one_stall_seconds": median(one.stall_seconds for one in ones),
        "two_seconds": median(two.seconds for two in twos),
        "two_attention_seconds": median(two.attention_seconds for two in twos),
        "two_stall_seconds": median(two.stall_seconds for two in twos),
        "two_over_one": median(ratios),
        "two_over_one_range": (min(ratios), max(ratios)),
        "predicted_gain": median(map(model.gain, ones)),
        "processor": this_processor().model,
        "commit": git_commit(),
    }


def run_pass(
    paged: PagedModel, owner: Handle, forward: Forward, plan: PassPlan, num_groups: int
) -> PassTimes:
    """A pass, timed."""
    attention_seconds, stall_seconds = paged.attention_seconds, owner.stall_seconds
    started = time.perf_counter()
    forward.run(plan)
    return PassTimes(
        num_groups=num_groups,
        num_tokens=plan.num_tokens,
        num_keys=sum(one.num_tokens for one in plan.sequences),
        seconds=time.perf_counter() - started,
        attention_seconds=paged.attention_seconds - attention_seconds,
        stall_seconds=owner.stall_seconds - stall_seconds,
    )


if __name__ == "__main__":
    main()
