"""Laws of exactness: the simulator's hits and misses are those of the runtime, layer by layer."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import moe_runtime
from moe_runtime.cache.belady import BeladyPolicy
from moe_runtime.cache.policy import EvictionPolicy
from moe_runtime.cache.static import StaticPolicy
from moe_runtime.measure.routing_recorder import RoutingRecorder
from moe_runtime.simulate.accesses import Accesses
from moe_runtime.simulate.replay import SimulationResult, simulate
from moe_runtime.trace import Phase, Trace
from moe_runtime.trace_writer import TraceWriter
from tests.tiny_models import tiny_model

DEMO = Path(moe_runtime.__file__).parent / "demo" / "mixtral-stdlib"
MEMORY = [0.1, 0.4, 0.7]  # of all experts; the first runs prompts in waves
NUM_NEW = 12
NUM_HIDDEN = 5  # tokens that the mask hides in the first row of the batch

pytestmark = pytest.mark.filterwarnings("ignore:.*expert slots are fewer")


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss", "demo"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint: random ones of two families, and the trained one that comes with us."""
    if request.param == "demo":
        return DEMO
    folder = tmp_path_factory.mktemp(request.param)
    tiny_model(request.param).save_pretrained(folder)
    return folder


def work(model: PreTrainedModel) -> None:
    """A prompt with what is decoded after it, a padded batch likewise, and a longer prompt."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size

    def ids(num_rows: int, num_tokens: int) -> torch.Tensor:
        return torch.randint(8, vocabulary, (num_rows, num_tokens), generator=generator)

    mask = torch.ones(3, 14, dtype=torch.long)
    mask[0, :NUM_HIDDEN] = 0
    for input_ids, attention_mask in (
        (ids(1, 9), torch.ones(1, 9, dtype=torch.long)),
        (ids(3, 14), mask),
    ):
        torch.manual_seed(0)
        model.generate(
            input_ids,
            attention_mask=attention_mask,
            max_new_tokens=NUM_NEW,
            min_new_tokens=NUM_NEW,
            do_sample=True,
            pad_token_id=0,
        )
    with torch.no_grad():
        model(input_ids=ids(2, 40))


@dataclass(frozen=True)
class Counts:
    """Hits and misses of each layer, with so many slots."""

    slots: int
    per_layer: list[tuple[int, int]]

    @classmethod
    def of(cls, result: SimulationResult) -> "Counts":
        pairs = zip(result.layer_hits, result.layer_misses, strict=True)
        return cls(result.slots, list(pairs))


def run(
    folder: Path, policy: str | EvictionPolicy, memory: float, file: Path
) -> tuple[Trace, Counts]:
    """What was routed, and what the runtime itself reports."""
    model = moe_runtime.load(
        folder, expert_memory=memory, exact=True, policy=policy, warm_start=False
    )
    with moe_runtime.handle(model) as handle:
        with TraceWriter(file) as writer, RoutingRecorder(model, writer, name="exact"):
            work(model)
        cache = handle.report()["cache"]
    pairs = [(layer["hits"], layer["misses"]) for layer in cache["per_layer"]]
    return Trace.load(file), Counts(cache["slots"], pairs)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("policy", ["lru", "lfu", "plec"])
def test_simulated_is_real(folder: Path, policy: str, memory: float, tmp_path: Path) -> None:
    """Law: decoding, prompts, waves and padded batches hit what the replay of their trace hits."""
    trace, real = run(folder, policy, memory, tmp_path / "t.npz")
    check_coverage(trace, real.slots, memory)
    (simulated,) = simulate(trace, slots=[real.slots], policies=[policy])
    assert Counts.of(simulated) == real
    assert simulated.misses > 0


@pytest.mark.parametrize("memory", MEMORY)
def test_simulated_is_real_where_the_future_is_known(
    folder: Path, memory: float, tmp_path: Path
) -> None:
    """Law: the runtime with favourites, or with Belady's choice, does as simulated too."""
    trace, real = run(folder, "lru", memory, tmp_path / "t.npz")
    slots, accesses = real.slots, Accesses.of(trace)
    make: dict[str, Callable[[], EvictionPolicy]] = {
        "static": lambda: StaticPolicy(accesses.most_used()[:slots]),
        "belady": lambda: BeladyPolicy(accesses.next_uses().tolist()),
    }
    for simulated in simulate(trace, slots=[slots], policies=list(make)):
        _, real = run(folder, make[simulated.policy](), memory, tmp_path / "again.npz")
        assert Counts.of(simulated) == real


def check_coverage(trace: Trace, slots: int, memory: float) -> None:
    """The run had every kind of step: decoding, prompts, padding, and waves where memory is low."""
    assert set(trace.phase.tolist()) == set(Phase)
    most = max(len(keys) for keys in Accesses.of(trace).visits())
    assert (most > slots) == (memory == MEMORY[0])
