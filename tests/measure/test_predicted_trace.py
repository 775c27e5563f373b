"""A predicted trace stands for the recorded one: placements made of it fit the model."""

from dataclasses import replace
from pathlib import Path

from moe_runtime.measure.predicted_trace import predict_trace
from moe_runtime.predictors.predictor import ModelFacts
from moe_runtime.predictors.store import load_predictor, save_predictor
from moe_runtime.predictors.token_table import TokenTable
from tests.predictors.planted import NUM_LAYERS, by_id, planted


def test_layers_stand_where_they_stand_in_the_model(tmp_path: Path) -> None:
    """Dense layers before and between count, also through the predictor's file."""
    layer_ids = tuple(range(1, 2 * NUM_LAYERS, 2))
    trace = replace(planted(by_id), layer_ids=layer_ids, num_hidden_layers=20)
    save_predictor(TokenTable.fit(trace, ModelFacts.of(trace)), tmp_path / "P.safetensors")
    predictor = load_predictor(tmp_path / "P.safetensors")
    predicted = predict_trace(predictor, [[1, 2], [3]], ["a", "b"], lambda done, total: None)
    assert (predicted.layer_ids, predicted.num_hidden_layers) == (layer_ids, 20)
    assert predicted.num_tokens == 3
