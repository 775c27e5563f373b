"""Decode attention over pages: the kernel, its levels and torch against an honest loop."""

import ctypes
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.kernels.cpu import attention as face
from moe_runtime.kernels.cpu.attention import TORCH, PagedAttention
from moe_runtime.kernels.cpu.attention_status import (
    LEVELS,
    PAGE_TOKENS,
    open_attention_library,
)
from moe_runtime.kernels.cpu.library import NOT_BUILT, OTHER_BUILD
from tests.kernels.test_cpu_gemv import compile_library

SOURCE = Path(face.__file__).with_name("attention.c")
# Of outputs of size 1: sums of a few hundred float32 products, and exp within 2 ulp.
TOLERANCE = 3e-6
# To bfloat16: eight bits, so that a number is off by 2^-8 of itself at most, and a little for sums.
ROUNDING = 1.01 * 2**-8
NUM_PAGES = 24


def available_levels() -> list[str]:
    library = open_attention_library()
    built = () if isinstance(library, str) else LEVELS[: library.moe_attention_levels() + 1]
    return [TORCH, *built]


@pytest.fixture(params=[TORCH, *LEVELS])
def attention(request: pytest.FixtureRequest) -> PagedAttention:
    if request.param not in available_levels():
        pytest.skip(f"no {request.param} here")
    return PagedAttention.load(request.param)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


class Case:
    """Sequences in scattered pages, whose unused tokens are NaN."""

    def __init__(
        self,
        lengths: list[int],
        *,
        num_heads: int = 4,
        num_groups: int = 2,
        key_width: int = 16,
        value_width: int = 16,
        window: int | None = None,
        has_sink: bool = False,
        softcap: float | None = None,
        dtype: torch.dtype = torch.float32,
        query_dtype: torch.dtype = torch.float32,
        scale: float = 1.0,
        seed: int = 0,
    ) -> None:
        draw = torch.Generator().manual_seed(seed)
        num_sequences = len(lengths)
        query = scale * torch.randn(num_sequences, num_heads, key_width, generator=draw)
        self.query = query.to(query_dtype)
        self.keys = torch.randn(NUM_PAGES, num_groups, key_width, PAGE_TOKENS, generator=draw).to(
            dtype
        )
        self.values = torch.randn(
            NUM_PAGES, num_groups, PAGE_TOKENS, value_width, generator=draw
        ).to(dtype)
        self.lengths = torch.tensor(lengths)
        width = max(-(-length // PAGE_TOKENS) for length in lengths)
        order = torch.randperm(NUM_PAGES, generator=draw)
        self.table = order[: num_sequences * width].view(num_sequences, width)
        sink = torch.randn(num_heads, generator=draw) if has_sink else None
        self.rule = {
            "scaling": key_width**-0.5,
            "window": window,
            "sink_H": sink,
            "softcap": softcap,
        }

    def run(self, attention: PagedAttention) -> torch.Tensor:
        return attention.run(
            self.query, self.keys, self.values, self.table, self.lengths, **self.rule
        )

    def poison(self) -> None:
        """NaN wherever no token of these sequences is."""
        used = set()
        for row, length in zip(self.table.tolist(), self.lengths.tolist(), strict=True):
            used |= {(row[t // PAGE_TOKENS], t % PAGE_TOKENS) for t in range(length)}
        for page in range(NUM_PAGES):
            for offset in range(PAGE_TOKENS):
                if (page, offset) not in used:
                    self.values[page, :, offset] = torch.nan
                    self.keys[page, :, :, offset] = torch.nan

    def expected(self, values: torch.Tensor | None = None) -> torch.Tensor:
        """One number after the other, in float64; of other `values`, if these are given."""
        values = self.values if values is None else values
        num_sequences, num_heads, _ = self.query.shape
        share = num_heads // self.keys.shape[1]
        out = torch.zeros(num_sequences, num_heads, self.values.shape[-1], dtype=torch.float64)
        for n, length in enumerate(self.lengths.tolist()):
            window = self.rule["window"]
            seen = range(0 if window is None else max(0, length - window), length)
            for h in range(num_heads):
                scores = []
                for t in seen:
                    page, offset = int(self.table[n, t // PAGE_TOKENS]), t % PAGE_TOKENS
                    key = self.keys[page, h // share, :, offset].double()
                    score = float(self.query[n, h].double() @ key) * self.rule["scaling"]
                    cap = self.rule["softcap"]
                    scores.append(cap * math.tanh(score / cap) if cap else score)
                sink = self.rule["sink_H"]
                top = max(scores + ([] if sink is None else [float(sink[h])]))
                total = 0.0 if sink is None else math.exp(float(sink[h]) - top)
                for t, score in zip(seen, scores, strict=True):
                    weight = math.exp(score - top)
                    total += weight
                    page, offset = int(self.table[n, t // PAGE_TOKENS]), t % PAGE_TOKENS
                    out[n, h] += weight * values[page, h // share, offset].double()
                out[n, h] /= total
        return out

    def check(self, attention: PagedAttention) -> None:
        expected = self.expected()
        difference = (self.run(attention).double() - expected).abs()
        rounding = torch.zeros(())
        if self.query.dtype == torch.bfloat16:  # so are outputs, and weights where keys are too
            rounding = ROUNDING * (expected.abs() + self.expected(self.values.abs()))
        assert (difference <= TOLERANCE + rounding).all(), float(difference.max())


@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=3),
    groups=st.sampled_from([(1, 1), (2, 1), (4, 2), (6, 2), (8, 1), (11, 1), (16, 2)]),
    key_width=st.sampled_from([1, 6, 16, 24, 64]),
    value_width=st.sampled_from([16, 32, 48, 64]),
    window=st.none() | st.integers(1, 120),
    has_sink=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    query_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
    level=st.sampled_from(available_levels()),
)
def test_every_level_agrees_with_the_honest_loop(
    lengths: list[int],
    groups: tuple[int, int],
    key_width: int,
    value_width: int,
    window: int | None,
    has_sink: bool,
    dtype: torch.dtype,
    query_dtype: torch.dtype,
    seed: int,
    level: str,
) -> None:
    num_heads, num_groups = groups
    Case(
        lengths,
        num_heads=num_heads,
        num_groups=num_groups,
        key_width=key_width,
        value_width=value_width,
        window=window,
        has_sink=has_sink,
        dtype=dtype,
        query_dtype=query_dtype,
        seed=seed,
    ).check(PagedAttention.load(level))


def test_a_soft_cap_and_odd_widths_are_computed_by_torch(attention: PagedAttention) -> None:
    Case([40, 3], softcap=0.5).check(attention)
    Case([40, 3], value_width=10).check(attention)


@pytest.mark.parametrize("scale", [1e-6, 30.0, 1e4])
def test_large_and_small_scores_neither_overflow_nor_vanish(
    scale: float, attention: PagedAttention
) -> None:
    case = Case([150, 1], scale=scale, has_sink=True)
    # Between two keys of nearly the same huge score float32 cannot tell; it must still choose.
    if scale < 1e4:
        assert (case.run(attention).double() - case.expected()).abs().max() < 1e-4
    assert case.run(attention).isfinite().all()


def test_tokens_beyond_a_sequence_have_no_weight(attention: PagedAttention) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        case = Case([33, 64, 1], has_sink=True, dtype=dtype, query_dtype=dtype)
        expected = case.run(attention)
        case.poison()
        assert torch.equal(case.run(attention), expected)


def test_bits_depend_neither_on_threads_nor_on_neighbours(
    attention: PagedAttention, threads: int
) -> None:
    case = Case([100, 7, 64], num_heads=8, dtype=torch.bfloat16, query_dtype=torch.bfloat16)
    together = case.run(attention)
    for n in range(3):
        alone = attention.run(
            case.query[n : n + 1],
            case.keys,
            case.values,
            case.table[n : n + 1].contiguous(),
            case.lengths[n : n + 1].contiguous(),
            **case.rule,
        )
        assert torch.equal(alone[0], together[n])


def test_what_would_read_foreign_memory_is_refused(attention: PagedAttention) -> None:
    case = Case([40, 3])
    good = [case.query, case.keys, case.values, case.table, case.lengths]
    for index, wrong, complaint in [
        (0, case.query[:, :3], "do not fit"),
        (1, case.keys[..., :16], "do not fit"),
        (1, case.keys.half(), "alike"),
        (2, case.values.mT.contiguous().mT, "contiguous"),
        (3, case.table.int(), "int64"),
        (3, case.table + NUM_PAGES, "outside"),
        (4, case.lengths[:1], "as many lengths"),
        (4, case.lengths + 100, "from 1 to"),
        (4, case.lengths * 0, "from 1 to"),
    ]:
        arguments = [*good[:index], wrong, *good[index + 1 :]]
        with pytest.raises(ValueError, match=complaint):
            attention.run(*arguments, **case.rule)


def test_a_level_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'mmx' is not there; choose from torch"):
        PagedAttention.load("mmx")


def test_a_checkout_that_was_not_built_says_so(tmp_path: Path) -> None:
    assert open_attention_library(tmp_path) == NOT_BUILT
    (tmp_path / "attention_library.so").write_bytes(b"not a library")
    assert open_attention_library(tmp_path) == OTHER_BUILD


def test_the_source_compiles_for_other_processors(tmp_path: Path) -> None:
    """There it is plain C."""
    compiler = shutil.which("cc") or pytest.skip("no C compiler")
    library_path = tmp_path / "library.so"
    compile_library(
        compiler, SOURCE, library_path, "-DMOE_OTHER_PROCESSOR", "-Werror", "-Wno-psabi"
    )
    assert ctypes.CDLL(str(library_path)).moe_attention_levels() == 0
