"""Other programs' recordings of routing become the trace that they say."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from moe_runtime.errors import TraceError
from moe_runtime.integrations import exflow, megatron, sglang, tensorrt_llm, vllm
from moe_runtime.measure.trace_import import import_traces
from moe_runtime.trace import Phase, Trace

# SGLang: 3 layers, the first dense; 4 experts in 6 slots; top-2 in rows of 8.
SLOT_MAP = [[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 3, 2], [1, 2, 3, 0, 2, 3]]


def sglang_record(
    number: int, positions: list[int], slots: list[list[list[int]]], chunks: list[int] | None = None
) -> dict[str, Any]:
    """As the per_token recorder writes one forward; `slots` [tokens][MoE layers][2]."""
    topk = torch.full((3, len(positions), 8), -1, dtype=torch.int32)
    topk[1:, :, :2] = torch.tensor(slots, dtype=torch.int32).transpose(0, 1)
    return {
        "forward_pass_id": number,
        "rank": 0,
        "gatherer_key": "primary",
        "input_ids": [100 * number + p for p in positions],
        "positions": positions,
        "extend_seq_lens": chunks,
        "forward_mode": 1 if chunks else 2,
        "topk_ids_of_layer": topk,
        "misc_objects": [],
    }


def sglang_dump(path: Path, records: list[dict[str, Any]]) -> Path:
    torch.save({"records": records, "last_physical_to_logical_map": torch.tensor(SLOT_MAP)}, path)
    return path


def test_sglang_slots_become_experts(tmp_path: Path) -> None:
    """Law: ids of slots are mapped back by their layer's row; dense layers and padding go."""
    path = sglang_dump(
        tmp_path / "dump_0.pt",
        [
            sglang_record(8, [2, 1], [[[4, 1], [5, 0]], [[0, 2], [1, 2]]]),
            sglang_record(
                7, [0, 1, 0], [[[0, 1], [2, 3]], [[2, 3], [0, 1]], [[5, 4], [4, 5]]], [2, 1]
            ),
        ],
    )
    found = sglang.read_trace(path)
    assert (found.layer_ids, found.num_hidden_layers, found.num_experts) == ((1, 2), 3, 4)
    # By hand: layer 1 maps 0..5 to 3 2 1 0 3 2, layer 2 to 1 2 3 0 2 3.
    expected = [
        [[3, 2], [3, 0]], [[1, 0], [1, 2]], [[2, 3], [2, 3]], [[3, 2], [3, 1]], [[3, 1], [2, 3]],
    ]  # fmt: skip
    np.testing.assert_array_equal(found.topk, expected)
    assert found.step.tolist() == [7, 7, 7, 8, 8]
    assert found.position.tolist() == [0, 1, 0, 2, 1]
    assert found.sequence_id.tolist() == [0, 0, 1, 0, 1]
    prefill, decode = Phase.PREFILL, Phase.DECODE
    assert found.phase.tolist() == [prefill, prefill, prefill, decode, decode]
    assert found.token_id is not None
    assert found.token_id.tolist() == [700, 701, 700, 802, 801]


def test_sglang_sequences_are_followed_by_position(tmp_path: Path) -> None:
    """Law: requests at the same position keep their order; one that ended takes no token back."""
    pair = [[0, 1], [0, 1]]
    path = sglang_dump(
        tmp_path / "dump.pt",
        [
            sglang_record(0, [0, 0, 0], [pair] * 3, [1, 1, 1]),
            sglang_record(1, [1, 1, 1], [pair] * 3),  # 0 1 2
            sglang_record(2, [2, 2], [pair] * 2),  # one of them ended: the later two are taken
            sglang_record(3, [0], [pair], [1]),  # 3
            sglang_record(4, [3, 3, 1], [pair] * 3),  # in order, and 3 goes on
            sglang_record(5, [7], [pair]),  # nobody was at 6: a new one
        ],
    )
    found = sglang.read_trace(path)
    assert found.sequence_id.tolist() == [0, 1, 2, 0, 1, 2, 1, 2, 3, 1, 2, 3, 4]


def test_sglang_padding_of_prompts_is_left_out(tmp_path: Path) -> None:
    """Law: rows beyond the prompts' lengths filled up a batch, and are no tokens."""
    pair = [[0, 1], [0, 1]]
    record = sglang_record(0, [0, 1, 0, 0], [pair] * 4, [2, 1])
    found = sglang.read_trace(sglang_dump(tmp_path / "dump.pt", [record]))
    assert found.position.tolist() == [0, 1, 0]
    assert found.sequence_id.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("dump", "said"),
    [
        (
            {"rank": 0, "logical_count": torch.zeros(2, 3, 4)},
            "counts of experts and no tokens, as mode stat writes; record with "
            "--expert-distribution-recorder-mode per_token, or let SGLang balance by these counts "
            "alone: --init-expert-location ",
        ),
        (
            {"records": [{"forward_pass_id": 0, "global_physical_count": torch.zeros(3, 6)}]},
            "counts of experts and no tokens, as mode per_pass writes",
        ),
        ({"records": []}, "holds no record"),
        ({"weights": 1}, "has no records; it is no dump of SGLang's recorder"),
        ({"records": [sglang_record(0, [0], [[[0, 1]] * 2])]}, "lacks last_physical_to_logical"),
    ],
)
def test_sglang_dumps_without_tokens_are_refused(
    dump: dict[str, Any], said: str, tmp_path: Path
) -> None:
    """Law: what holds no tokens is refused, with the mode that records them."""
    torch.save(dump, tmp_path / "dump.pt")
    with pytest.raises(TraceError, match=said):
        sglang.read_trace(tmp_path / "dump.pt")


def test_sglang_dumps_that_contradict_themselves(tmp_path: Path) -> None:
    """Law: a slot beyond the map, and tokens without ids, name the record."""
    record = sglang_record(0, [0, 1], [[[0, 6], [0, 1]]] * 2, [2])
    with pytest.raises(
        TraceError, match=r"records\[0\] holds slot 6, and the map ends at 5; .*fus"
    ):
        sglang.read_trace(sglang_dump(tmp_path / "a.pt", [record]))
    record = sglang_record(0, [0, 1], [[[0, 2], [0, 1]]] * 2, [2]) | {"input_ids": [1]}
    with pytest.raises(TraceError, match=r"records\[0\] has 3 layers and 2 tokens, .* 1 tokens"):
        sglang.read_trace(sglang_dump(tmp_path / "b.pt", [record]))
    with pytest.raises(TraceError, match="holds no tokens"):
        sglang.read_trace(
            sglang_dump(tmp_path / "c.pt", [sglang_record(0, [], np.zeros((0, 2, 2)))])
        )  # type: ignore[arg-type]


def test_loads_of_all_ranks_add_up(tmp_path: Path) -> None:
    """Law: experts of the trace are used as often as the ranks' counts of slots say together."""
    rng = np.random.default_rng(0)
    counted = np.zeros((2, 4), np.int64)
    files = []
    for rank in range(3):
        slots = np.argsort(rng.random((5, 2, 6)), axis=2)[..., :2]
        for layer in range(2):
            physical = np.bincount(slots[:, layer].ravel(), minlength=6)
            np.add.at(counted[layer], SLOT_MAP[layer + 1], physical)
        # A token that has an expert in two slots cannot be: SGLang picks slots of distinct experts.
        experts = np.array(SLOT_MAP)[1:][np.arange(2)[None, :, None], slots]
        alike = experts[..., 0] == experts[..., 1]
        for token, layer in np.argwhere(alike):
            old = slots[token, layer, 1]
            new = next(s for s in range(6) if SLOT_MAP[layer + 1][s] != experts[token, layer, 0])
            slots[token, layer, 1] = new
            counted[layer, SLOT_MAP[layer + 1][old]] -= 1
            counted[layer, SLOT_MAP[layer + 1][new]] += 1
        record = sglang_record(0, [0, 1, 2, 3, 4], slots.tolist(), [5])
        files.append(sglang_dump(tmp_path / f"d_{rank}.pt", [record]))
    import_traces(files, tmp_path / "t.npz", source="sglang")
    found = Trace.load(tmp_path / "t.npz")
    loads = [np.bincount(found.topk[:, layer].ravel(), minlength=4) for layer in range(2)]
    np.testing.assert_array_equal(loads, counted)


def test_ranks_are_put_together_and_copies_are_refused(tmp_path: Path) -> None:
    """Law: a trace holds the tokens of all ranks, in sequences of their own, each once."""
    first = sglang_dump(tmp_path / "d_0.pt", [sglang_record(0, [0, 1], [[[0, 1]] * 2] * 2, [2])])
    second = sglang_dump(tmp_path / "d_1.pt", [sglang_record(0, [0], [[[2, 3]] * 2], [1])])
    done = import_traces(
        [first, second], tmp_path / "t.npz", source="sglang", model="m", domain="code"
    )
    found = Trace.load(tmp_path / "t.npz")
    assert (done.num_files, done.num_tokens, done.num_sequences) == (2, 3, 2)
    assert found.model == "m"
    assert found.domain is not None
    assert set(found.domain) == {"code"}
    assert found.sequence_id.tolist() == [0, 0, 1]
    with pytest.raises(
        TraceError, match=r"d_0\.pt holds the same routing as .*d_0\.pt: ranks that"
    ):
        import_traces(
            [first, second, tmp_path / ".." / tmp_path.name / "d_0.pt"],
            tmp_path / "u.npz",
            source="sglang",
        )


def test_tensorrt_llm_raw_statistics(tmp_path: Path) -> None:
    """Law: iterations are steps, layers keep their numbers, rows of all layers are one token."""
    arrays = {
        "12_3": np.array([[0, 5], [1, 2]]),
        "12_4": np.array([[7, 1], [3, 0]]),
        "11_3": np.array([[4, 6]]),
        "11_4": np.array([[2, 3]]),
    }
    save_file(arrays, tmp_path / "rank0_raw.safetensors")
    (tmp_path / "meta_info.json").write_text('{"num_experts": 8, "num_experts_per_token": 2}')
    found = tensorrt_llm.read_trace(tmp_path / "rank0_raw.safetensors")
    np.testing.assert_array_equal(
        found.topk, [[[4, 6], [2, 3]], [[0, 5], [7, 1]], [[1, 2], [3, 0]]]
    )
    assert found.step.tolist() == [11, 12, 12]
    assert (found.layer_ids, found.num_experts) == ((3, 4), 8)


def test_tensorrt_llm_files_without_tokens(tmp_path: Path) -> None:
    """Law: counts, holes and missing facts are named."""
    with pytest.raises(TraceError, match=r"statistics of TensorRT-LLM hold counts .* generate_"):
        tensorrt_llm.read_trace(tmp_path / "rank0.safetensors")
    path = tmp_path / "rank0_raw.safetensors"
    with pytest.raises(TraceError, match="cannot be read"):
        tensorrt_llm.read_trace(path)
    for arrays, said in (
        ({"1_0": np.zeros(8, np.int64)}, r"1_0 is int64 of shape \[8\]; entries are named"),
        ({"1_0": np.ones((2, 1), int), "1_1": np.ones((3, 1), int)}, "iteration 1 has shapes"),
        ({"1_0": np.ones((2, 1), int), "2_1": np.ones((2, 1), int)}, "in 1 of 2 layers"),
        ({"1_0": np.ones((0, 1), int)}, "holds no tokens; widen EXPERT_STATISTIC_ITER_RANGE"),
        ({"1_0": np.ones((2, 1), int)}, "meta_info.json does not say num_experts"),
    ):
        save_file(arrays, path)
        with pytest.raises(TraceError, match=said):
            tensorrt_llm.read_trace(path)
    path.write_bytes(b"1234567890")
    with pytest.raises(TraceError, match="is damaged"):
        tensorrt_llm.read_trace(path)


def megatron_line(step: int, layer: int, rows: list[list[int]], **more: Any) -> str:
    record = {
        "step": step, "stage": "pre_dispatch", "block": "decoder", "layer": layer, "rank": 0,
        "num_tokens": len(rows), "topk": len(rows[0]), "top_indices": rows,
    }  # fmt: skip
    return json.dumps(record | more)


def test_megatron_router_traces(tmp_path: Path) -> None:
    """Law: micro-batches of a step stay apart, predictors of further tokens are left out."""
    path = tmp_path / "router_trace_rank0.jsonl"
    path.write_text(
        "\n".join(
            [
                megatron_line(0, 2, [[0, 3], [1, 2]]),
                megatron_line(0, 4, [[1, 2], [0, 1]]),
                megatron_line(0, 2, [[2, 3]]),
                megatron_line(0, 4, [[0, 2]]),
                megatron_line(0, 2, [[3, 2]], block="mtp", mtp_idx=0),
                megatron_line(1, 2, [[0, 1]]),
                megatron_line(1, 4, [[0, 3]]),
            ]
        )
        + "\n"
    )
    found = megatron.read_trace(path, num_experts=8)
    expected = [[[0, 3], [1, 2]], [[1, 2], [0, 1]], [[2, 3], [0, 2]], [[0, 1], [0, 3]]]
    np.testing.assert_array_equal(found.topk, expected)
    assert found.step.tolist() == [0, 0, 1, 2]
    assert found.layer_ids == (2, 4)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["{"], "line 1 is not JSON"),
        (["[]"], "line 1 is no object"),
        (["{}"], "line 1 lacks step, layer or top_indices"),
        ([megatron_line(0, 2, [[0, 3]], num_tokens=5)], r"\[num_tokens, topk\], which are 5 and 2"),
        ([megatron_line(0, 2, [[0, 1]], top_indices=[["a", "b"]])], "must be whole numbers"),
        ([megatron_line(0, 2, [[0, 3]]), megatron_line(0, 3, [[0, 1]] * 2)], "has shapes"),
        ([megatron_line(0, 2, [[0, 3]]), megatron_line(1, 3, [[0, 1]])], "in 1 of 2 layers"),
        ([], "holds no routing of decoder layers"),
    ],
)
def test_bad_megatron_traces(lines: list[str], said: str, tmp_path: Path) -> None:
    """Law: the line or the step, and what is wrong with it."""
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    with pytest.raises(TraceError, match=said):
        megatron.read_trace(tmp_path / "t.jsonl")


def test_ids_in_order_are_told(tmp_path: Path) -> None:
    """Law: when every row ascends, the import says that first experts mean nothing."""
    rng = np.random.default_rng(0)
    rows = [sorted(rng.choice(8, 2, replace=False).tolist()) for _ in range(100)]
    for name, told in ((rows, True), ([row[::-1] for row in rows], False), (rows[:50], False)):
        path = tmp_path / "t.jsonl"
        path.write_text("\n".join(megatron_line(step, 0, [row]) for step, row in enumerate(name)))
        done = import_traces([path], tmp_path / "t.npz", source="megatron", num_experts=8)
        assert done.is_sorted_by_id == told


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.int32])
def test_vllm_requests(dtype: type[np.integer[Any]], tmp_path: Path) -> None:
    """Law: an array is a sequence; layers that are zero throughout are dense."""
    one = np.array([[[0, 0], [3, 0], [1, 2]], [[0, 0], [0, 1], [2, 0]]], dtype)
    other = np.array([[[0, 0], [2, 1], [0, 3]]], dtype)
    np.save(tmp_path / "one.npy", one)
    np.savez(tmp_path / "all.npz", request_0=one, request_1=other)
    alone = vllm.read_trace(tmp_path / "one.npy", num_experts=4)
    found = vllm.read_trace(tmp_path / "all.npz", num_experts=4)
    np.testing.assert_array_equal(alone.topk, one[:, 1:])
    np.testing.assert_array_equal(found.topk, np.concatenate([one, other])[:, 1:])
    assert found.sequence_id.tolist() == [0, 0, 1]
    assert found.position.tolist() == [0, 1, 0]
    assert (found.layer_ids, found.num_hidden_layers) == ((1, 2), 3)


def test_bad_vllm_files(tmp_path: Path) -> None:
    """Law: the array and what routed_experts look like."""
    for arrays, said in (
        ({"a": np.zeros((2, 3))}, r"a is float64 of shape \[2, 3\]; routed_experts are whole"),
        ({"a": np.zeros((2, 3, 2), int)}, "is zero throughout"),
        ({"a": np.ones((2, 3, 1), int), "b": np.ones((2, 2, 1), int)}, "requests of one model"),
        ({"topk": np.ones((2, 3, 1), int)}, "is a trace of ours; import it --from npz"),
    ):
        np.savez(tmp_path / "bad.npz", **arrays)
        with pytest.raises(TraceError, match=said):
            vllm.read_trace(tmp_path / "bad.npz")
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(TraceError, match=r"no sound \.npy or \.npz"):
        vllm.read_trace(tmp_path / "bad.npz")
    with pytest.raises(TraceError, match="cannot be read: No such file"):
        vllm.read_trace(tmp_path / "absent.npy")


def test_exflow_paths(tmp_path: Path) -> None:
    """Law: one expert a layer and token."""
    path = tmp_path / "trace.npy"
    np.save(path, np.array([[0, 3, 1], [2, 2, 0]]))
    found = exflow.read_trace(path, num_experts=4)
    np.testing.assert_array_equal(found.topk[..., 0], [[0, 3, 1], [2, 2, 0]])
    assert (found.top_k, found.num_experts) == (1, 4)
    np.save(path, np.zeros((2, 3, 1)))
    with pytest.raises(TraceError, match=r"float64 of shape \[2, 3, 1\]; a trace of ExFlow is"):
        exflow.read_trace(path)
    path.write_bytes(b"\x93NUMPY")
    with pytest.raises(TraceError, match=r"no sound \.npy"):
        exflow.read_trace(path)
