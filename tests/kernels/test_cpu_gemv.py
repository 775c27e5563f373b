"""The C one-row product has torch's bits, on any address, and touches nothing but its tensors."""

import ctypes
import mmap
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from moe_runtime.kernels.cpu import gemv as face
from moe_runtime.kernels.cpu.gemv import CpuGemv
from moe_runtime.kernels.cpu.gemv_status import open_gemv_library
from moe_runtime.kernels.cpu.library import NOT_BUILT, OTHER_BUILD
from moe_runtime.kernels.reference import bf16_gemv_reference

SOURCE = Path(face.__file__).with_name("gemv.c")
CANARY = 12345.0
K_BLOCK = 512
# Shapes of real experts (Mixtral's with fewer rows), then tails of every kind.
REAL_SHAPES = [
    (3584, 512), (512, 1792), (2048, 2048), (2048, 1024), (2816, 2048), (2048, 1408),
    (1024, 4096), (512, 14336), (2880, 2880),
]  # fmt: skip
ODD_SHAPES = [
    (48, 96), (40, 1000), (100, 513), (100, 515), (100, 514), (100, 544), (65, 800), (17, 520),
    (1000, 1000), (79, 4095), (129, 130), (2048, 33),
]  # fmt: skip


@pytest.fixture(scope="module")
def gemv() -> CpuGemv:
    kernel = CpuGemv.load()
    if kernel is None:
        pytest.skip(CpuGemv.status())
    return kernel


@pytest.fixture
def torch_order() -> None:
    """Skip where torch's bf16 products come from tiles: the trial refuses there, as it should."""
    if "amx_bf16" in Path("/proc/cpuinfo").read_text():
        pytest.skip("torch computes bf16 with AMX on this CPU, in another order")


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch cuts K by its number of threads where N is small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def bf16(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def cancelling(N: int, K: int) -> tuple[torch.Tensor, torch.Tensor]:
    """W and x of which W x is nothing but rounding errors: any other order gives other bits."""
    w_NK, x_1K = bf16(N, K), bf16(1, K, seed=1)
    half = K // 2
    w_NK[:, half : 2 * half] = w_NK[:, :half].flip(1)
    x_1K[:, half : 2 * half] = -x_1K[:, :half].flip(1)
    x_1K[:, 2 * half :] = 0
    return w_NK, x_1K


def at_offset(tensor: torch.Tensor, num_bytes: int) -> torch.Tensor:
    """A copy that begins `num_bytes` behind a multiple of 64."""
    room = torch.empty(tensor.numel() + 64, dtype=tensor.dtype)
    skip = (num_bytes - room.data_ptr()) % 64 // 2
    copy = room[skip : skip + tensor.numel()].view(tensor.shape)
    assert copy.data_ptr() % 64 == num_bytes
    return copy.copy_(tensor)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, the sign of zero too; one NaN is as good as another."""
    is_nan = a.isnan()
    return torch.equal(is_nan, b.isnan()) and torch.equal(
        a[~is_nan].view(torch.int16), b[~is_nan].view(torch.int16)
    )


@pytest.mark.usefixtures("torch_order")
@pytest.mark.parametrize(("N", "K"), REAL_SHAPES)
def test_real_shapes_have_the_bits_of_torch(N: int, K: int, gemv: CpuGemv, threads: int) -> None:
    for w_NK, x_1K in (cancelling(N, K), (bf16(N, K), bf16(1, K, seed=1))):
        assert same_bits(gemv.run([w_NK], x_1K, K_BLOCK), functional.linear(x_1K, w_NK))


@pytest.mark.usefixtures("torch_order", "one_thread")
@pytest.mark.parametrize(("N", "K"), ODD_SHAPES)
def test_odd_shapes_have_the_bits_of_torch(N: int, K: int, gemv: CpuGemv) -> None:
    for w_NK, x_1K in (cancelling(N, K), (bf16(N, K), bf16(1, K, seed=1))):
        assert same_bits(gemv.run([w_NK], x_1K, K_BLOCK), functional.linear(x_1K, w_NK))


@pytest.mark.parametrize("k_block", [2, 6, 32, 70, 512])
@pytest.mark.parametrize(("N", "K"), [(1, 1), (1, 2), (3, 31), (15, 64), (16, 33), (48, 64),
                                      (64, 24), (40, 64), (70, 200), (33, 1030)])  # fmt: skip
def test_every_tail_and_block_agrees_with_the_reference(
    N: int, K: int, k_block: int, gemv: CpuGemv
) -> None:
    w_NK, x_1K = cancelling(N, K)
    expected = bf16_gemv_reference(w_NK, x_1K[0], k_block)
    assert torch.equal(gemv.run([w_NK], x_1K, k_block)[0], expected)


def test_the_inputs_of_these_tests_tell_orders_apart(gemv: CpuGemv) -> None:
    w_NK, x_1K = cancelling(512, 1792)
    right, wrong = (gemv.run([w_NK], x_1K, k_block) for k_block in (512, 1024))
    assert (right != wrong).float().mean() > 0.5


@pytest.mark.usefixtures("torch_order")
@pytest.mark.parametrize("offset", [0, 2, 8, 32, 62])
@pytest.mark.parametrize(("N", "K"), [(512, 1792), (129, 515)])
def test_any_address_will_do(N: int, K: int, offset: int, gemv: CpuGemv) -> None:
    w_NK, x_1K = cancelling(N, K)
    expected = functional.linear(x_1K, w_NK)
    y_1N = gemv.run([at_offset(w_NK, offset)], at_offset(x_1K, offset), K_BLOCK)
    assert same_bits(y_1N, expected)


@pytest.mark.usefixtures("torch_order")
@pytest.mark.parametrize("special", ["denormal", "tiny", "infinite", "nan", "huge", "zeros"])
@pytest.mark.parametrize(("N", "K"), [(512, 1792), (100, 513)])
def test_special_numbers_are_treated_as_torch_does(
    special: str, N: int, K: int, gemv: CpuGemv
) -> None:
    w_NK, x_1K = bf16(N, K), bf16(1, K, seed=1)
    if special == "denormal":
        w_NK = (w_NK.float() * 2.0**-128).bfloat16()
    elif special == "tiny":  # products and sums around the least normal number
        w_NK, x_1K = (w_NK.float() * 2.0**-65).bfloat16(), (x_1K.float() * 2.0**-64).bfloat16()
    elif special == "infinite":
        w_NK[::3, 5] = torch.inf
        w_NK[::5, -1] = -torch.inf
    elif special == "nan":
        w_NK[::3, 7] = torch.nan
        x_1K[0, 9] = 0
        w_NK[1::7, 9] = torch.inf
    elif special == "huge":
        w_NK = (w_NK.float() * 2.0**126).bfloat16()
    else:
        w_NK, x_1K = -w_NK.abs(), torch.zeros_like(x_1K)
    assert same_bits(gemv.run([w_NK], x_1K, K_BLOCK), functional.linear(x_1K, w_NK))


@pytest.mark.usefixtures("torch_order")
@pytest.mark.parametrize("num_experts", [1, 2, 3, 8])
@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.parametrize(("N", "K"), [(512, 1792), (200, 1000)])
def test_several_experts_in_one_call(
    N: int, K: int, is_shared: bool, num_experts: int, gemv: CpuGemv, threads: int
) -> None:
    weights = [bf16(N, K, seed=e) for e in range(num_experts)]
    x_kK = bf16(1 if is_shared else num_experts, K, seed=99)
    y_kN = gemv.run(weights, x_kK, K_BLOCK)
    for e, w_NK in enumerate(weights):
        x_1K = x_kK if is_shared else x_kK[e : e + 1]
        assert same_bits(y_kN[e : e + 1], functional.linear(x_1K, w_NK))


@pytest.mark.parametrize("N", [1, 15, 16, 17, 63, 64, 65, 200, 2048])
def test_nothing_is_written_outside_the_output(
    N: int, gemv: CpuGemv, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    margin = 64
    room = torch.full((2 * N + 2 * margin,), CANARY, dtype=torch.bfloat16)
    inside = room[margin : margin + 2 * N].view(2, N)
    weights, x_1K = [bf16(N, 256, seed=e) for e in (0, 1)], bf16(1, 256, seed=9)
    expected = gemv.run(weights, x_1K, K_BLOCK)
    with monkeypatch.context() as patch:
        patch.setattr(face.torch, "empty", lambda *_, **__: inside)
        gemv.run(weights, x_1K, K_BLOCK)
    assert torch.equal(inside, expected)
    outside = torch.cat([room[:margin], room[margin + 2 * N :]])
    assert (outside == room.new_tensor(CANARY)).all()


@pytest.mark.parametrize(
    ("N", "K"), [(1, 1), (1, 2), (3, 33), (16, 32), (17, 520), (64, 512), (100, 513), (65, 1792)]
)
def test_nothing_is_read_outside_the_weight_and_the_input(N: int, K: int, gemv: CpuGemv) -> None:
    """The last element stands before a page that must not be touched, the first behind one."""
    w_NK, x_1K = cancelling(N, K)
    expected = gemv.run([w_NK], x_1K, K_BLOCK)
    for at_end in (True, False):
        with_guard_w, with_guard_x = (between_guards(t, at_end=at_end) for t in (w_NK, x_1K))
        assert torch.equal(gemv.run([with_guard_w], with_guard_x, K_BLOCK), expected)


def between_guards(tensor: torch.Tensor, *, at_end: bool) -> torch.Tensor:
    """A copy in pages of its own, with a page that faults before and behind them."""
    page = mmap.PAGESIZE
    inner = -(-tensor.nbytes // page) * page
    room = mmap.mmap(-1, inner + 2 * page)
    everything = torch.frombuffer(room, dtype=torch.bfloat16)
    libc = ctypes.CDLL(None, use_errno=True)
    for guard in (0, page + inner):
        address = ctypes.c_void_p(everything.data_ptr() + guard)
        assert libc.mprotect(address, ctypes.c_size_t(page), 0) == 0  # PROT_NONE
    first = (page + (inner - tensor.nbytes if at_end else 0)) // 2
    return everything[first : first + tensor.numel()].view(tensor.shape).copy_(tensor)


@pytest.mark.usefixtures("torch_order")
@pytest.mark.parametrize(("N", "K"), [(512, 1792), (3584, 512), (96, 48), (100, 513)])
def test_the_trial_finds_a_block_that_agrees(N: int, K: int, gemv: CpuGemv, threads: int) -> None:
    k_block = gemv.find_k_block(N, K)
    assert k_block is not None
    w_NK, x_1K = cancelling(N, K)
    assert same_bits(gemv.run([w_NK], x_1K, k_block), functional.linear(x_1K, w_NK))


@pytest.mark.parametrize("wrong", ["order", "denormals"])
def test_the_trial_refuses_what_torch_computes_otherwise(
    wrong: str, gemv: CpuGemv, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with another oneDNN, or another instruction set."""

    def other_linear(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        if wrong == "denormals":
            y_1N: torch.Tensor = gemv.run([w], x, K_BLOCK)
            return torch.where(y_1N.abs() < 2.0**-120, x.new_tensor(2.0**-130), y_1N)
        return (x.float() @ w.float().t()).bfloat16()

    monkeypatch.setattr(face.functional, "linear", other_linear)
    assert gemv.find_k_block(128, 1024) is None


def test_the_trial_leaves_the_random_numbers_of_the_caller_alone(gemv: CpuGemv) -> None:
    before = torch.random.get_rng_state()
    gemv.find_k_block(64, 96)
    assert torch.equal(before, torch.random.get_rng_state())


def test_what_would_read_foreign_memory_is_refused(gemv: CpuGemv) -> None:
    w, x = bf16(32, 64), bf16(1, 64)
    for weights, inputs, k_block, complaint in [
        ([], x, 512, "weights is empty"),
        ([w, bf16(32, 62)], x, 512, "of one shape"),
        ([w.float()], x, 512, "bf16"),
        ([w.t()], x, 512, "contiguous"),
        ([w], bf16(1, 62), 512, "64 columns"),
        ([w], x[0], 512, "64 columns"),
        ([w], x.float(), 512, "bf16"),
        ([w, w, w], bf16(2, 64), 512, "2 rows for 3 weights"),
        ([w], x, 0, "even and positive"),
        ([w], x, 33, "even and positive"),
    ]:
        with pytest.raises(ValueError, match=complaint):
            gemv.run(weights, inputs, k_block)


def test_a_checkout_that_was_not_built_says_so(tmp_path: Path) -> None:
    assert open_gemv_library(tmp_path) == NOT_BUILT


def test_a_library_that_is_not_this_one_is_not_called(tmp_path: Path) -> None:
    (tmp_path / "gemv_library.so").write_bytes(b"not a library")
    assert open_gemv_library(tmp_path) == OTHER_BUILD


def test_a_library_of_another_interface_is_not_called(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or pytest.skip("no C compiler")
    (tmp_path / "old.c").write_text(
        "int moe_gemv_interface(void) { return 0; } int moe_gemv_supported(void) { return 1; }"
    )
    compile_library(compiler, tmp_path / "old.c", tmp_path / "gemv_library.so")
    assert open_gemv_library(tmp_path) == OTHER_BUILD


def test_the_source_compiles_for_other_processors(tmp_path: Path) -> None:
    """There it is a library that says that it is not supported."""
    compiler = shutil.which("cc") or pytest.skip("no C compiler")
    library_path = tmp_path / "library.so"
    compile_library(compiler, SOURCE, library_path, "-DMOE_OTHER_PROCESSOR", "-Werror")
    assert ctypes.CDLL(str(library_path)).moe_gemv_supported() == 0


def compile_library(compiler: str, source: Path, library: Path, *flags: str) -> None:
    subprocess.run(
        [
            compiler,
            "-std=c11",
            "-Wall",
            "-Wextra",
            *flags,
            "-shared",
            "-fPIC",
            source,
            "-o",
            library,
        ],
        check=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )
