"""A trace survives its file, fills in what is missing as stated, and says what is wrong with it."""

import io
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.errors import TraceError
from moe_runtime.trace import Phase, Trace
from moe_runtime.trace_fields import COMMON_NUM_EXPERTS, FIELDS, SCALARS
from moe_runtime.trace_file import Member, write_npz
from moe_runtime.trace_writer import TraceWriter

SHARED = Path(__file__).resolve().parents[2] / "shared" / "traces"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the folder ../shared/traces with recorded traces is absent"
)


def example(
    num_tokens: int = 40,
    num_layers: int = 3,
    top_k: int = 2,
    num_experts: int = 8,
    seed: int = 0,
) -> dict[str, Any]:
    """Every field of a sound trace: two rows a step, some ids missing, the first row padding."""
    rng = np.random.default_rng(seed)
    shape = (num_tokens, num_layers)
    topk = rng.random((*shape, num_experts)).argsort(-1)[..., :top_k].astype(np.int16)
    topk[rng.random(shape) < 0.05] = -1
    topk[-1, -1] = np.arange(top_k)  # never all of them missing
    phase = rng.integers(0, 2, num_tokens).astype(np.uint8)
    position = np.arange(num_tokens, dtype=np.int32)
    phase[0], position[0] = Phase.PADDING, -1
    weights = rng.random(topk.shape).astype(np.float16)
    return {
        "topk": topk,
        "weights": np.where(topk < 0, np.float16(0), weights),
        "token_id": rng.integers(-1, 1000, num_tokens).astype(np.int32),
        "sequence_id": (np.arange(num_tokens) % 2).astype(np.int32),
        "position": position,
        "phase": phase,
        "step": np.arange(num_tokens) // 2,
        "domain": np.array(["code", "médecine", ""])[np.arange(num_tokens) % 3],
        "gate_probs": rng.random((*shape, num_experts)).astype(np.float16),
        "hidden": rng.standard_normal((*shape, 5)).astype(np.float16),
        "num_experts": num_experts,
        "num_hidden_layers": num_layers + 2,
        "layer_ids": tuple(range(1, num_layers + 1)),
        "model": "org/name",
        "checkpoint": "0123456789abcdef",
    }


def assert_same(found: Trace, expected: Trace) -> None:
    assert found.arrays().keys() == expected.arrays().keys()
    for name, array in expected.arrays().items():
        got = getattr(found, name)
        np.testing.assert_array_equal(got, array, err_msg=name)
        if name != "domain":
            assert got.dtype == array.dtype == np.dtype(FIELDS[name].dtype)
    for name in SCALARS:
        assert getattr(found, name) == getattr(expected, name)


sizes = st.fixed_dictionaries(
    {
        "num_tokens": st.integers(1, 30),
        "num_layers": st.integers(1, 4),
        "top_k": st.integers(1, 4),
        "num_experts": st.integers(4, 20),
        "seed": st.integers(0, 1000),
    }
)


@given(size=sizes, absent=st.sets(st.sampled_from([f for f in FIELDS if f != "topk"])))
def test_a_trace_survives_its_file(
    size: dict[str, int], absent: set[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Law: load(save(trace)) is the trace, whatever fields it has."""
    file = tmp_path_factory.mktemp("trace") / "t.npz"
    fields = {name: value for name, value in example(**size).items() if name not in absent}
    if {"phase", "position"} & absent:  # a padding row needs both
        fields = {k: v for k, v in fields.items() if k not in ("phase", "position")}
    trace = Trace.of(fields)
    trace.save(file)
    assert_same(Trace.load(file), trace)


@given(size=sizes, cuts=st.lists(st.integers(0, 30), max_size=4))
def test_blocks_make_the_same_file_as_the_whole(
    size: dict[str, int], cuts: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Law: a trace written block by block is the one saved at once, to the byte."""
    folder = tmp_path_factory.mktemp("trace")
    trace = Trace.of(example(**size) | {"step": np.arange(size["num_tokens"])})
    trace.save(folder / "whole.npz")
    with TraceWriter(folder / "blocks.npz") as writer:
        for rows in np.split(np.arange(trace.num_tokens), sorted(cuts)):
            writer.append(trace.select(rows))
    assert_same(Trace.load(folder / "blocks.npz"), trace)
    assert sorted(path.name for path in folder.iterdir()) == ["blocks.npz", "whole.npz"]
    if trace.domain is None or not trace.domain.dtype.itemsize:
        return
    whole, blocks = (zipfile.ZipFile(folder / f"{n}.npz") for n in ("whole", "blocks"))
    for member in whole.namelist():
        if member != "domain.npy":  # its width is that of the longest name there is
            assert whole.read(member) == blocks.read(member), member


def test_a_file_is_plain_numpy(tmp_path: Path) -> None:
    """Law: numpy alone reads a trace, without pickles; numbers are compressed."""
    Trace.of(example(num_tokens=2000)).save(tmp_path / "t.npz")
    with np.load(tmp_path / "t.npz", allow_pickle=False) as archive:
        assert set(archive.files) == set(example())
        assert archive["num_experts"].shape == ()
    with zipfile.ZipFile(tmp_path / "t.npz") as archive:
        info = archive.getinfo("topk.npy")
        assert info.compress_size < info.file_size / 2
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "t.npz").stat().st_mode & 0o777 == 0o666 & ~umask


def test_missing_fields_are_inferred_as_stated() -> None:
    """Law: one sequence, counted positions, all rows decoded, one token a step, all layers."""
    trace = Trace.of({"topk": example()["topk"]})
    assert trace.num_steps == trace.num_tokens == 40
    assert not trace.sequence_id.any()
    np.testing.assert_array_equal(trace.position, np.arange(40))
    assert set(trace.phase) == {Phase.DECODE}
    assert trace.layer_ids == (0, 1, 2)
    assert trace.num_hidden_layers == 3
    assert trace.model == "unknown"
    assert trace.checkpoint == ""
    for name in ("weights", "token_id", "domain", "gate_probs", "hidden"):
        assert getattr(trace, name) is None


def test_positions_count_within_a_sequence_and_leave_padding_out() -> None:
    """Law: a missing position is the number of earlier rows of its sequence."""
    trace = Trace.of(
        {
            "topk": np.zeros((6, 1, 1), np.int16),
            "sequence_id": np.array([7, 3, 7, 7, 3, 7]),
            "phase": np.array([0, 0, 2, 1, 1, 1]),
        }
    )
    np.testing.assert_array_equal(trace.position, [0, 0, -1, 1, 1, 2])


@given(largest=st.integers(0, 1100))
def test_num_experts_is_the_next_common_size(largest: int) -> None:
    """Law: without num_experts it is the next common size above the largest id."""
    found = Trace.of({"topk": np.full((1, 1, 1), largest)}).num_experts
    assert found > largest
    assert found in COMMON_NUM_EXPERTS or found % 512 == 0
    assert not [size for size in COMMON_NUM_EXPERTS if largest < size < found]
    assert Trace.of({"topk": np.full((1, 1, 1), largest)}, num_experts=2000).num_experts == 2000


def test_weights_of_missing_experts_are_nothing() -> None:
    """Law: where topk is -1 the weight is 0, whatever stood there."""
    fields = example()
    fields["weights"] = np.where(fields["topk"] < 0, np.float16(np.nan), fields["weights"])
    weights = Trace.of(fields).weights
    assert weights is not None
    assert (weights[fields["topk"] < 0] == 0).all()
    assert (fields["topk"] < 0).any()


def test_select_keeps_order() -> None:
    """Law: select takes a mask or indices, and rows stay in the order of the trace."""
    trace = Trace.of(example())
    mask = trace.sequence_id == 1
    by_index = trace.select(np.flatnonzero(mask)[::-1])
    assert_same(by_index, trace.select(mask))
    assert (trace.select(mask).sequence_id == 1).all()


def test_fields_can_be_left_out(tmp_path: Path) -> None:
    """Law: what is left out is not read, even where it is damaged."""
    Trace.of(example()).save(tmp_path / "t.npz")
    flip(tmp_path / "t.npz", "hidden.npy")
    with pytest.raises(TraceError, match="hidden is damaged"):
        Trace.load(tmp_path / "t.npz")
    assert Trace.load(tmp_path / "t.npz", leave_out=["hidden"]).hidden is None


def change(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda fields: fields | changes


def at(name: str, place: Any, value: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """One value of one field."""

    def damage(fields: dict[str, Any]) -> dict[str, Any]:
        array = np.array(fields[name])
        array[place] = value
        return fields | {name: array}

    return damage


BAD_FIELDS = {
    "has no field topk .it has weights, .*a trace needs at least topk": lambda f: {
        k: v for k, v in f.items() if k != "topk"
    },
    r"topk has shape \[40, 6\]; it must be": lambda f: f | {"topk": f["topk"].reshape(40, 6)},
    "topk is float64; expert ids must be integers": lambda f: f | {"topk": f["topk"] * 1.0},
    r"topk is empty, shape \[0, 3, 2\]": lambda f: f | {"topk": f["topk"][:0]},
    "every id of topk is -1": lambda f: f | {"topk": f["topk"] * 0 - 1},
    r"topk\[3, 1, 0\] is -2; it must be from -1 to 32767": at("topk", (3, 1, 0), -2),
    r"topk\[3, 1, 0\] is 8 and num_experts is 8, so ids end at 7; give": at("topk", (3, 1, 0), 8),
    r"topk\[3, 1\] holds expert 5 twice; .* write -1": at("topk", (3, 1), 5),
    r"weights has shape \[39, 3, 2\].*asks for \[40, 3, 2\]": lambda f: (
        f | {"weights": f["weights"][1:]}
    ),
    r"step has shape \[39\], .*asks for \[40\]": lambda f: f | {"step": f["step"][1:]},
    r"gate_probs has shape \[40, 3, 7\].*num_experts 8 asks for \[40, 3, 8\]": lambda f: (
        f | {"gate_probs": f["gate_probs"][..., 1:]}
    ),
    r"hidden has shape \[40, 2, 5\].*asks for \[40, 3, 5\]": lambda f: (
        f | {"hidden": f["hidden"][:, 1:]}
    ),
    "weights is int16; it must be floating-point": lambda f: f | {"weights": f["topk"]},
    r"weights\[39, 2, 0\] is inf; it must be from -65504": at("weights", (39, 2, 0), np.inf),
    r"weights\[39, 2, 1\] is nan; it must be": at("weights", (39, 2, 1), np.nan),
    r"gate_probs\[0, 0, 1\] is 2.0; it must be from 0 to 1": at("gate_probs", (0, 0, 1), 2),
    r"hidden\[0, 0, 1\] is nan": at("hidden", (0, 0, 1), np.nan),
    r"phase\[5\] is 3; it must be from 0 to 2": at("phase", 5, 3),
    "phase is float64; it must be integers": lambda f: f | {"phase": f["phase"] * 1.0},
    r"sequence_id\[5\] is -1; it must be from 0": at("sequence_id", 5, -1),
    r"token_id\[2\] is 4294967296; it must be": lambda f: at("token_id", 2, 2**32)(
        f | {"token_id": f["token_id"].astype(np.int64)}
    ),
    r"step\[7\] is 1 after 3; steps must not decrease, sort": at("step", 7, 1),
    r"position\[5\] is -1 in a (prefill|decode) row; padding rows, phase 2": at("position", 5, -1),
    r"position\[0\] is 4 in a padding row": at("position", 0, 4),
    "domain is int64; it must be text": lambda f: f | {"domain": np.arange(40)},
    r"num_experts is float64 of shape \[\]; it must be one integer": change(num_experts=8.5),
    "num_experts is 40000; at most 32768": change(num_experts=40000),
    r"layer_ids is int64 of shape \[2\]; .* each of topk's 3 layers": change(layer_ids=(1, 2)),
    r"layer_ids \[1, 3, 3\] must ascend": change(layer_ids=(1, 3, 3)),
    "num_hidden_layers is 3, and layer_ids goes up to 3; .* at least 4": change(
        num_hidden_layers=3
    ),
    "model is int64 of shape": change(model=7),
}


@pytest.mark.parametrize("message", BAD_FIELDS)
def test_what_contradicts_itself_is_refused(message: str, tmp_path: Path) -> None:
    """Law: one line names the file, the field, the value, the limit and the remedy."""
    file = tmp_path / "t.npz"
    np.savez(file, **BAD_FIELDS[message](example()))
    with pytest.raises(TraceError, match=message) as caught:
        Trace.load(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def flip(file: Path, member: str) -> None:
    """Change a byte in the middle of a member's data."""
    with zipfile.ZipFile(file) as archive:
        info = archive.getinfo(member)
    raw = bytearray(file.read_bytes())
    start = info.header_offset + 30 + len(member) + 20  # the local header with its zip64 field
    raw[start + info.compress_size // 2] ^= 0xFF
    file.write_bytes(raw)


def with_member(file: Path, name: str, data: bytes) -> None:
    """An archive in which `name` holds `data`."""
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, data)


def npy(array: Any, **settings: Any) -> bytes:
    raw = io.BytesIO()
    np.save(raw, array, **settings)
    return raw.getvalue()


BAD_FILES: dict[str, Callable[[Path], object]] = {
    "cannot be read: No such file": lambda f: f.unlink(),
    "cannot be read: Is a directory": lambda f: (f.unlink(), f.mkdir()),
    "is empty; copy it again": lambda f: f.write_bytes(b""),
    "is cut short: the index at the end": lambda f: f.write_bytes(f.read_bytes()[:-1000]),
    "is not an .npz archive; other formats go through": lambda f: f.write_bytes(b"a,b\n1,2\n"),
    "is a single array; save it with": lambda f: f.write_bytes(npy(np.arange(3))),
    "topk is damaged": lambda f: flip(f, "topk.npy"),
    "step is damaged": lambda f: flip(f, "step.npy"),
    "topk holds pickled Python objects, which could run code": lambda f: with_member(
        f, "topk.npy", npy(np.array([{}, []], object), allow_pickle=True)
    ),
    "topk is damaged .*; copy it again": lambda f: with_member(
        f, "topk.npy", npy(np.zeros((9, 9, 9)))[:500]
    ),
    "topk.txt is not a NumPy array": lambda f: with_member(f, "topk.txt", b"1 2 3"),
    "topk is damaged .* record the trace again": lambda f: with_member(
        f, "topk.npy", npy(np.zeros(3)).replace(b"(3,)", b"3e9,")
    ),
    "topk is void": lambda f: with_member(f, "topk.npy", npy(np.zeros((2, 1, 1), "i4,i4"))),
}


@pytest.mark.parametrize("message", BAD_FILES)
def test_damaged_files_are_named(message: str, tmp_path: Path) -> None:
    """Law: whatever happened to a file, one line says which it is and what to do."""
    file = tmp_path / "t.npz"
    Trace.of(example(num_tokens=400)).save(file)
    BAD_FILES[message](file)
    expected = message.replace("topk is void", r"topk is \[")
    with pytest.raises(TraceError, match=expected) as caught:
        Trace.load(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    """Law: loading runs no code of the file."""

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "exploded",))

    file = tmp_path / "t.npz"
    file.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(TraceError):
        Trace.load(file)
    with_member(file, "topk.npy", npy(np.array([Bomb()], object), allow_pickle=True))
    with pytest.raises(TraceError):
        Trace.load(file)
    assert not (tmp_path / "exploded").exists()


@given(cut=st.floats(0, 0.999))
def test_no_cut_file_is_a_trace(cut: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Law: wherever a file ends too soon, it is refused, in one line."""
    file = tmp_path_factory.mktemp("trace") / "t.npz"
    Trace.of(example()).save(file)
    raw = file.read_bytes()
    file.write_bytes(raw[: int(len(raw) * cut)])
    with pytest.raises(TraceError) as caught:
        Trace.load(file)
    assert "\n" not in str(caught.value)


@given(where=st.floats(0, 0.9999), value=st.integers(1, 255))
def test_no_flipped_byte_ends_in_another_error(
    where: float, value: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Law: a damaged byte is refused or does no harm; it never escapes as a foreign exception."""
    file = tmp_path_factory.mktemp("trace") / "t.npz"
    trace = Trace.of(example())
    trace.save(file)
    raw = bytearray(file.read_bytes())
    raw[int(len(raw) * where)] ^= value
    file.write_bytes(raw)
    # Dates, permissions and the like may change; what has a checksum is as it was.
    with suppress(TraceError):
        np.testing.assert_array_equal(Trace.load(file).topk, trace.topk)


def test_a_saved_file_replaces_the_old_one_whole(tmp_path: Path) -> None:
    """Law: a name holds a whole trace or what it held before, and nothing is left beside it."""
    file = tmp_path / "t.npz"
    Trace.of(example()).save(file)
    before = file.read_bytes()

    def blocks() -> Iterator[Any]:
        yield np.arange(3)
        raise KeyboardInterrupt

    member = Member(name="step", dtype=np.dtype(np.int64), shape=(6,), blocks=blocks())
    with pytest.raises(KeyboardInterrupt):
        write_npz(file, [member])
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_an_interrupted_recording_keeps_what_it_has(tmp_path: Path) -> None:
    """Law: rows before an interrupt are a trace of their own, never under the final name."""
    trace = Trace.of(example())

    def run() -> None:
        with TraceWriter(tmp_path / "t.npz") as writer:
            writer.append(trace)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert [path.name for path in tmp_path.iterdir()] == ["t.partial.npz"]
    assert_same(Trace.load(tmp_path / "t.partial.npz"), trace)


def test_a_recording_of_nothing_is_no_trace(tmp_path: Path) -> None:
    """Law: without rows there is an error and no file."""
    with pytest.raises(TraceError, match=r"t\.npz would be empty: nothing was recorded"):
        TraceWriter(tmp_path / "t.npz").close()
    assert not list(tmp_path.iterdir())


def test_blocks_must_be_alike(tmp_path: Path) -> None:
    """Law: a block of another model or with other fields is refused, with what differs."""
    first = Trace.of(example())
    others = {
        "num_experts 9, and the blocks before it 8": {"num_experts": 9} | {"gate_probs": None},
        "model other, and": {"model": "other"},
        r"hidden of row shape \(3, 6\)": {"hidden": np.zeros((40, 3, 6), np.float16)},
        "fields .*, and the blocks before it": {"weights": None},
    }
    writer = TraceWriter(tmp_path / "t.npz")
    writer.append(first.select(np.arange(40)))
    for message, changes in others.items():
        pattern = message if "gate_probs" not in changes else "fields"
        with pytest.raises(TraceError, match=pattern):
            writer.append(Trace.of(example() | changes))
    writer.discard()
    assert not list(tmp_path.iterdir())


def test_steps_go_on_from_block_to_block(tmp_path: Path) -> None:
    """Law: steps of a later block follow those of the one before."""
    block = Trace.of(example() | {"step": np.full(40, 5)})
    with TraceWriter(tmp_path / "t.npz") as writer:
        writer.append(block)
        writer.append(block)
    assert list(np.unique(Trace.load(tmp_path / "t.npz").step)) == [0, 1]


@needs_shared
@pytest.mark.parametrize(
    ("name", "shape", "num_experts", "num_sequences"),
    [
        ("gptoss20b.npz", (142766, 24, 4), 32, 458),
        ("gemma4_26b_a4b_top6_topk.npz", (157, 30, 6), 128, 1),
        ("gptoss120b_top2_topk.npz", (149, 36, 2), 128, 1),
    ],
)
def test_traces_of_others_load(
    name: str, shape: tuple[int, ...], num_experts: int, num_sequences: int
) -> None:
    """Law: real traces with fewer fields load, and keep what they say."""
    trace = Trace.load(SHARED / name)
    with np.load(SHARED / name, allow_pickle=False) as archive:
        np.testing.assert_array_equal(trace.topk, archive["topk"])
        np.testing.assert_array_equal(trace.position, archive["position"])
    assert trace.topk.shape == shape
    assert trace.num_experts == num_experts
    assert len(np.unique(trace.sequence_id)) == num_sequences
    assert trace.num_steps == trace.num_tokens


@needs_shared
def test_counts_are_not_a_trace() -> None:
    """Law: a file of something else is refused by what it lacks."""
    with pytest.raises(TraceError, match=r"olmoe.* has no field topk .it has layers, arxiv"):
        Trace.load(SHARED / "olmoe1b7b_crosslayer_counts.npz")
