"""The C experts equal the honest loop, whatever shares a call, and touch no byte of others."""

import copy
import ctypes
import mmap
import pickle
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from moe_runtime.kernels.cpu import experts as face
from moe_runtime.kernels.cpu.experts import CpuExperts
from moe_runtime.kernels.cpu.experts_layer import ExpertsStep
from moe_runtime.kernels.cpu.experts_status import (
    LEVELS,
    NO_INSTRUCTIONS,
    experts_status,
    open_experts_library,
)
from moe_runtime.kernels.cpu.library import NOT_BUILT, OTHER_BUILD
from moe_runtime.kernels.cpu.linear import CpuLinear
from moe_runtime.kernels.cpu.operation import Gate, KernelGate, TorchGate
from moe_runtime.kernels.reference import cpu_experts_reference

SOURCE = Path(face.__file__).with_name("experts.c")
CASES = [
    (level, dtype)
    for level in LEVELS
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    if level != "avx512_bf16" or dtype == torch.bfloat16
]
# Three roundings of relative size eps / 2 at most (gated numbers, output, and the weight's own
# products in float32), each relative to terms of which some cancel: norms of a few eps.
TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-9, torch.float32: 2**-19}
ACTIVATIONS: dict[Gate, Callable[[torch.Tensor], torch.Tensor]] = {
    Gate.SILU: functional.silu,
    Gate.GELU_TANH: partial(functional.gelu, approximate="tanh"),
    Gate.RELU: functional.relu,
    Gate.RELU_SQUARED: lambda x: functional.relu(x).square(),
}


def kernel_of(level: str, dtype: torch.dtype) -> CpuExperts:
    kernel = CpuExperts.load(dtype, level=level)
    if kernel is None:
        pytest.skip(f"{level} for {dtype} is not here: {CpuExperts.status(dtype)}")
    return kernel


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{str(case[1])[6:]}")
def kernel(request: pytest.FixtureRequest) -> CpuExperts:
    return kernel_of(*request.param)


@pytest.fixture
def bf16() -> CpuExperts:
    kernel = CpuExperts.load(torch.bfloat16)
    if kernel is None:
        pytest.skip(CpuExperts.status())
    return kernel


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


class Layer:
    """A small random layer, and what routing gives each of its experts."""

    def __init__(
        self,
        dtype: torch.dtype,
        counts: list[int],
        *,
        num_tokens: int = 5,
        dim: int = 64,
        ffn: int = 48,
        has_gate: bool = True,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def noise(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        self.ffn, self.num_up = ffn, ffn * (2 if has_gate else 1)
        self.x = noise(num_tokens, dim).to(dtype)
        self.up = [(noise(self.num_up, dim) * dim**-0.5).to(dtype) for _ in counts]
        self.down = [(noise(dim, ffn) * ffn**-0.5).to(dtype) for _ in counts]
        ends = torch.tensor(counts).cumsum(0).tolist()
        self.rows = [(end - count, end) for count, end in zip(counts, ends, strict=True)]
        self.token = torch.randint(num_tokens, (sum(counts),), generator=generator)
        self.weight = torch.rand(sum(counts), generator=generator)

    def run(
        self,
        kernel: CpuExperts,
        gate: KernelGate | TorchGate = Gate.SILU,
        *,
        groups: list[list[int]] | None = None,
        is_interleaved: bool = False,
    ) -> torch.Tensor:
        step = self.begin(kernel, gate, is_interleaved=is_interleaved)
        step._scratch.fill_(float("nan"))
        out = None
        groups = groups or [list(range(len(self.rows)))]
        for n, group in enumerate(groups):
            out = step.run(
                [self.up[e] for e in group],
                [self.down[e] for e in group],
                [self.rows[e] for e in group],
                is_last=n == len(groups) - 1,
            )
        assert out is not None
        return out

    def begin(
        self, kernel: CpuExperts, gate: KernelGate | TorchGate, *, is_interleaved: bool = False
    ) -> ExpertsStep:
        return kernel.layer(
            dim=self.x.shape[1],
            ffn=self.ffn,
            num_up=self.num_up,
            gate=gate,
            is_interleaved=is_interleaved,
        ).begin(self.x, self.token, self.weight)

    def expected(self, gate: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return cpu_experts_reference(
            self.x, self.up, self.down, self.rows, self.token, self.weight, gate
        )


def gated(
    activation: Callable[[torch.Tensor], torch.Tensor], *, interleaved: bool = False
) -> Callable[[torch.Tensor], torch.Tensor]:
    def gate(v: torch.Tensor) -> torch.Tensor:
        first, second = (v[..., ::2], v[..., 1::2]) if interleaved else v.chunk(2, dim=-1)
        return activation(first) * second

    return gate


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    error = (found.double() - expected).norm()
    assert error <= TOLERANCE[found.dtype] * expected.norm(), f"{error} of {expected.norm()}"


@pytest.mark.parametrize("counts", [[1], [1, 1, 1], [2, 0, 1], [8], [3, 17, 4, 0, 5], [16, 9]])
def test_equals_the_honest_loop(kernel: CpuExperts, counts: list[int]) -> None:
    """Ragged, empty and single rows, below and above the rows that share registers."""
    layer = Layer(kernel.dtype, counts)
    assert_close(layer.run(kernel), layer.expected(gated(functional.silu)))


@pytest.mark.parametrize(
    ("dim", "ffn"), [(1, 1), (31, 33), (64, 65), (129, 7), (515, 100), (2048, 40), (200, 1030)]
)
def test_odd_sizes(kernel: CpuExperts, dim: int, ffn: int) -> None:
    layer = Layer(kernel.dtype, [1, 6, 2], dim=dim, ffn=ffn)
    assert_close(layer.run(kernel), layer.expected(gated(functional.silu)))


@pytest.mark.parametrize("gate", list(ACTIVATIONS))
def test_every_gate(kernel: CpuExperts, gate: Gate) -> None:
    activation = ACTIVATIONS[gate]
    layer = Layer(kernel.dtype, [2, 5])
    assert_close(layer.run(kernel, gate), layer.expected(gated(activation)))
    found = layer.run(kernel, gate, is_interleaved=True)
    assert_close(found, layer.expected(gated(activation, interleaved=True)))
    plain = Layer(kernel.dtype, [2, 5], has_gate=False)
    assert_close(plain.run(kernel, gate), plain.expected(activation))


def test_a_gate_in_torch_stands_between_the_two_products(kernel: CpuExperts) -> None:
    layer = Layer(kernel.dtype, [2, 0, 3])

    def clamped(v: torch.Tensor) -> torch.Tensor:
        first, second = v.chunk(2, dim=-1)
        return functional.silu(first.clamp(max=0.5)) * second.clamp(-0.5, 0.5)

    assert_close(layer.run(kernel, clamped), layer.expected(clamped))


@pytest.mark.parametrize("size", [1e-3, 1.0, 50.0, 1e4, 1e30])
def test_activations_do_not_overflow(bf16: CpuExperts, size: float) -> None:
    kernel = CpuExperts.load(torch.float32)
    assert kernel is not None
    v = (torch.linspace(-1, 1, 63) * size)[:, None]
    ones = torch.ones(1, 1)
    for gate in (Gate.SILU, Gate.GELU_TANH):
        layer = kernel.layer(dim=1, ffn=1, num_up=1, gate=gate)
        step = layer.begin(v, torch.arange(63), torch.ones(63))
        found = step.run([ones], [ones], [(0, 63)], is_last=True)
        assert found is not None
        # e^x in float32, of an argument that is itself rounded. Of numbers far below zero torch's
        # 1 + tanh has nothing left, ours has.
        torch.testing.assert_close(
            found, ACTIVATIONS[gate](v.double()).float(), rtol=2e-5, atol=1e-14
        )


@given(
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(any),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_bits_do_not_depend_on_what_shares_a_call(
    counts: list[int], seed: int, data: st.DataObject
) -> None:
    """Law: however experts arrive, in whatever calls, the output has the same bits."""
    kernel = CpuExperts.load(torch.bfloat16)
    if kernel is None:
        pytest.skip(CpuExperts.status())
    layer = Layer(torch.bfloat16, counts, seed=seed)
    order = data.draw(st.permutations(range(len(counts))))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(counts)), max_size=3)) | {len(counts)})
    groups = [order[a:b] for a, b in zip([0, *cuts[:-1]], cuts, strict=True)]
    assert torch.equal(layer.run(kernel), layer.run(kernel, groups=[list(g) for g in groups]))


def test_bits_do_not_depend_on_other_tokens_of_the_expert(kernel: CpuExperts) -> None:
    """Law: a row has the same bits alone and among any number of others."""
    layer = Layer(kernel.dtype, [16], num_tokens=16, dim=300, ffn=77)
    layer.token = torch.arange(16)
    together = layer.run(kernel)
    x, weight = layer.x, layer.weight
    for count in (1, 2, 3, 4, 5, 7, 12):
        layer.x, layer.weight = x[:count], weight[:count]
        layer.token, layer.rows = torch.arange(count), [(0, count)]
        assert torch.equal(layer.run(kernel), together[:count])


def test_bits_do_not_depend_on_threads(bf16: CpuExperts, threads: int) -> None:
    """Law: large enough for threads to share, the output is that of one thread."""
    layer = Layer(torch.bfloat16, [1, 2, 5, 1], dim=512, ffn=640)
    found = layer.run(bf16)
    torch.set_num_threads(1)
    assert torch.equal(found, layer.run(bf16))


def test_reads_and_writes_nothing_else(kernel: CpuExperts) -> None:
    """Law: weights that end with the last byte of a page before a forbidden one are read."""
    dim, ffn = 37, 29
    layer = Layer(kernel.dtype, [1, 5], dim=dim, ffn=ffn)
    expected = layer.run(kernel)
    libc = ctypes.CDLL(None, use_errno=True)
    held = []
    for matrices in (layer.up, layer.down):
        for e, w in enumerate(matrices):
            num_bytes = w.numel() * w.element_size()
            size = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
            area = mmap.mmap(-1, size + mmap.PAGESIZE)
            address = ctypes.addressof(ctypes.c_char.from_buffer(area))
            assert libc.mprotect(ctypes.c_void_p(address + size), mmap.PAGESIZE, 0) == 0
            at_end = torch.frombuffer(
                area, dtype=kernel.dtype, count=w.numel(), offset=size - num_bytes
            ).view(w.shape)
            at_end.copy_(w)
            matrices[e] = at_end
            held.append((area, address + size))
    try:
        assert torch.equal(layer.run(kernel), expected)
    finally:
        for _, address in held:
            libc.mprotect(ctypes.c_void_p(address), mmap.PAGESIZE, 3)


@pytest.mark.parametrize("offset", [2, 10, 62])
def test_any_address(kernel: CpuExperts, offset: int) -> None:
    layer = Layer(kernel.dtype, [1, 5], dim=96, ffn=64)
    expected = layer.run(kernel)
    elements = offset if kernel.dtype != torch.float32 else offset // 2
    layer.up = [
        torch.cat([w.new_zeros(elements), w.flatten()])[elements:].view(w.shape) for w in layer.up
    ]
    assert torch.equal(layer.run(kernel), expected)


def test_outputs_of_others_are_summed_in_their_place(bf16: CpuExperts) -> None:
    """Law: `put` rows count as if the kernel had computed them."""
    layer = Layer(torch.bfloat16, [2, 3], num_tokens=3)
    silu = gated(functional.silu)
    step = layer.begin(bf16, Gate.SILU)
    step.run(layer.up[:1], layer.down[:1], layer.rows[:1], is_last=False)
    x_nD = layer.x[layer.token[2:5]]
    step.put(2, silu(x_nD.double() @ layer.up[1].double().T) @ layer.down[1].double().T)
    assert_close(step.sum(), layer.expected(silu))


def test_nan_and_infinity_arrive(kernel: CpuExperts) -> None:
    layer = Layer(kernel.dtype, [1, 1], num_tokens=2)
    layer.token = torch.tensor([0, 1])
    layer.x[0, 3] = float("nan")
    out = layer.run(kernel)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


def test_bad_tensors_are_refused(bf16: CpuExperts) -> None:
    layer = Layer(torch.bfloat16, [2])
    good = layer.up[0]
    for bad in (good.float(), good[:-1], good.t().contiguous().t(), good[:, :-1].contiguous()):
        layer.up[0] = bad
        with pytest.raises(ValueError, match=r"up must be a contiguous torch\.bfloat16 CPU tensor"):
            layer.run(bf16)
    layer.up[0] = good
    layer.weight = layer.weight.bfloat16()
    with pytest.raises(ValueError, match=r"weight must be a contiguous torch\.float32"):
        layer.run(bf16)


@pytest.mark.parametrize("num_tokens", [1, 3, 8])
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_rounds_once(kernel: CpuExperts, num_tokens: int, has_bias: bool) -> None:
    """Law: a linear layer is the rounded float64 one, but for sums in float32."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(70, 130, generator=generator).to(kernel.dtype)
    x = torch.randn(num_tokens, 130, generator=generator).to(kernel.dtype)
    bias = torch.randn(70, generator=generator).to(kernel.dtype) if has_bias else None
    linear = CpuLinear(kernel, w, bias)
    expected = functional.linear(x.double(), w.double(), None if bias is None else bias.double())
    assert_close(linear(x), expected)
    assert linear.is_for(w)
    assert not linear.is_for(w.clone())
    with pytest.raises(ValueError, match="x must be"):
        linear(x[:, 1:])


def test_a_kernel_survives_copies(bf16: CpuExperts) -> None:
    layer = Layer(torch.bfloat16, [2])
    for other in (copy.deepcopy(bf16), pickle.loads(pickle.dumps(bf16))):
        assert torch.equal(layer.run(other), layer.run(bf16))


def test_without_a_compiled_library_torch_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert open_experts_library(tmp_path) == NOT_BUILT
    (tmp_path / "experts_library.so").write_bytes(b"not a library")
    assert open_experts_library(tmp_path) == OTHER_BUILD
    monkeypatch.setattr(face, "open_experts_library", lambda: NOT_BUILT)
    assert CpuExperts.load(torch.bfloat16) is None


def test_dtypes_without_a_kernel_are_torch() -> None:
    assert CpuExperts.load(torch.float64) is None
    assert experts_status("float64").startswith("torch")


def test_another_processor_builds_and_supports_nothing(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    library = tmp_path / "experts_library.so"
    command = [compiler, "-std=c11", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([*command, "-DMOE_OTHER_PROCESSOR", "-o", str(library), str(SOURCE)], check=True)
    assert open_experts_library(tmp_path) == NO_INSTRUCTIONS


def test_compiles_without_a_warning(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    command = [compiler, "-std=c11", "-O3", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([*command, "-o", str(tmp_path / "x.so"), str(SOURCE)], check=True)
