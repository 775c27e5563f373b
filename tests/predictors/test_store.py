"""Laws of predictor files: only whole ones, of the right model, are loaded."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moe_runtime.errors import PredictorError
from moe_runtime.predictors.counts import check_fit
from moe_runtime.predictors.frequency import Frequency
from moe_runtime.predictors.gate_lookahead import GateLookahead
from moe_runtime.predictors.markov import Markov2
from moe_runtime.predictors.predictor import ModelFacts
from moe_runtime.predictors.split import Split, split_by_sequence
from moe_runtime.predictors.store import load_predictor, save_predictor, split_of
from moe_runtime.predictors.token_table import TokenTable
from moe_runtime.trace import Trace
from tests.predictors.planted import by_id, facts_for, planted


@pytest.fixture
def trace() -> Trace:
    return planted(by_id, num_sequences=10)


@pytest.fixture
def file(trace: Trace, tmp_path: Path) -> Path:
    save_predictor(Frequency.fit(trace, ModelFacts.of(trace)), tmp_path / "P.safetensors")
    return tmp_path / "P.safetensors"


def test_a_predictor_of_another_model_is_refused_with_both_fingerprints(
    file: Path, trace: Trace
) -> None:
    own = facts_for(trace).fingerprint
    with pytest.raises(PredictorError, match=r"planted, 4 layers.*wanted is other, 4 layers"):
        load_predictor(file, replace(own, model="other"))
    with pytest.raises(PredictorError, match=r"of 8 experts.*of 9 experts"):
        load_predictor(file, replace(own, num_experts=9))


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_a_damaged_file_is_refused(file: Path, kept: int) -> None:
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(PredictorError, match=r"train it again|cannot be read"):
        load_predictor(file)


def test_a_file_that_is_none_of_ours_is_refused(tmp_path: Path) -> None:
    (tmp_path / "P.safetensors").write_bytes(b"hello, I am a text")
    with pytest.raises(PredictorError, match="damaged or no predictor"):
        load_predictor(tmp_path / "P.safetensors")
    with pytest.raises(PredictorError, match="cannot be read"):
        load_predictor(tmp_path / "absent.safetensors")


def test_numbers_that_are_not_finite_are_refused(trace: Trace, tmp_path: Path) -> None:
    fitted = Frequency.fit(trace, ModelFacts.of(trace))
    shares = fitted.shares.copy()
    shares[0, 0] = np.nan
    save_predictor(replace(fitted, shares=shares), tmp_path / "P.safetensors")
    with pytest.raises(PredictorError, match="shares holds numbers that are not finite"):
        load_predictor(tmp_path / "P.safetensors")


def test_a_missing_field_is_named_with_the_predictor(trace: Trace) -> None:
    bare = replace(trace, token_id=None)
    with pytest.raises(PredictorError, match="token_table needs the field token_id"):
        TokenTable.fit(bare, ModelFacts.of(bare))
    with pytest.raises(PredictorError, match=r"gate_lookahead needs the field hidden.*--hidden"):
        GateLookahead.fit(trace, facts_for(trace))


def test_gates_that_are_not_given_are_asked_for() -> None:
    trace = planted(by_id, num_sequences=5, hidden=True)
    with pytest.raises(PredictorError, match="give the checkpoint with --model"):
        GateLookahead.fit(trace, ModelFacts.of(trace))


def test_a_trace_of_another_model_is_refused(trace: Trace) -> None:
    other = replace(trace, model="another")
    with pytest.raises(PredictorError, match=r"trace another, .*; model planted, "):
        check_fit("markov", (), other, facts_for(trace))


def test_a_table_beyond_the_memory_limit_is_refused() -> None:
    topk = np.zeros((8, 48, 1), np.int16)
    large = Trace.of({"topk": topk, "num_experts": 256})
    with pytest.raises(PredictorError, match="use markov"):
        Markov2.fit(large, ModelFacts.of(large))


def test_a_split_keeps_sequences_whole_and_is_remembered(trace: Trace, tmp_path: Path) -> None:
    split = Split(held_out=0.3, seed=4)
    fit, judge = split_by_sequence(trace, split)
    assert not set(fit.sequence_id) & set(judge.sequence_id)
    assert fit.num_tokens + judge.num_tokens == trace.num_tokens
    assert len(set(judge.sequence_id.tolist())) == 3
    fitted = Frequency.fit(fit, ModelFacts.of(fit))
    save_predictor(fitted, tmp_path / "P.safetensors", split)
    assert split_of(tmp_path / "P.safetensors") == split


def test_too_few_sequences_are_refused() -> None:
    with pytest.raises(PredictorError, match=r"has 4 sequence\(s\).*needs 5; record more"):
        split_by_sequence(planted(by_id, num_sequences=4), Split())
