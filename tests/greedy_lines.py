"""Lines of unlike lengths for tiny models: run together by an engine, and each alone."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

import moe_runtime
from moe_runtime.cache.scan import ScanPolicy
from moe_runtime.offline.engine import Forward, OfflineEngine, PassReport
from moe_runtime.offline.pass_scheduler import Scheduler
from moe_runtime.offline.pass_size import PassSize
from moe_runtime.offline.sequence import Sequence as Line
from moe_runtime.offline.weight_reads import WeightReads
from tests.tiny_models import tiny_model


def load_tiny(
    folder: Path,
    name: str,
    policy: str | ScanPolicy = "lru",
    *,
    dtype: str = "float32",
    expert_memory: str = "50%",
) -> PreTrainedModel:
    """A tiny model of that family, its experts on disk in `folder`."""
    tiny_model(name).save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few slots
        return moe_runtime.load(
            folder, expert_memory=expert_memory, policy=policy, warm_start=False, dtype=dtype
        )


def make_lines(sizes: Sequence[tuple[int, int]]) -> list[Line]:
    """Tokens of the prompt and new ones, of each."""
    draw = torch.Generator().manual_seed(3)
    return [
        Line(
            number=number,
            prompt_ids=torch.randint(8, 160, (prompt,), generator=draw).tolist(),
            max_new_tokens=new,
        )
        for number, (prompt, new) in enumerate(sizes)
    ]


def run_lines(
    forward: Forward,
    scheduler: Scheduler,
    size: PassSize,
    *,
    weights: WeightReads,
    num_lines: int,
) -> PassReport:
    """Greedy, to the end of each line, of which there are so many."""

    def choose(logits_NV: torch.Tensor, sequences: Sequence[Line]) -> list[int]:
        assert len(logits_NV) == len(sequences)
        assert not logits_NV.requires_grad
        return logits_NV.argmax(-1).tolist()

    engine = OfflineEngine(
        forward,
        scheduler,
        size,
        weights=weights,
        choose=choose,
        is_finished=lambda line: len(line.written) == line.max_new_tokens,
    )
    assert len(list(engine.run())) == num_lines
    return engine.report


def alone(model: PreTrainedModel, line: Line) -> list[int]:
    """What transformers' generate() writes."""
    ids = torch.tensor([line.prompt_ids])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=line.max_new_tokens,
        min_new_tokens=line.max_new_tokens,
        eos_token_id=None,
        do_sample=False,
    )
    return output[0, len(line.prompt_ids) :].tolist()
