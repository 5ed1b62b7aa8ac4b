import numpy as np
import pytest

from tracin_transforms.core.checkpoints import (
    Checkpoint,
    CheckpointSeries,
    series_from_json,
    series_to_json,
)
from tracin_transforms.core.errors import InputError

ENTRY = {"id": "epoch-02", "path": "a.keras", "step": 938, "learning_rate": 0.05, "loss": 0.6}
DOCUMENT = {
    "format": 1,
    "loss": "sparse_categorical_crossentropy",
    "from_logits": True,
    "batch_size": 128,
    "optimizer": "sgd",
    "checkpoints": [ENTRY, {**ENTRY, "id": "epoch-04", "learning_rate": 0.01}],
}


def test_json_round_trip_and_weights():
    series = series_from_json(DOCUMENT)

    assert series_from_json(series_to_json(series)) == series
    assert [c.id for c in series.checkpoints] == ["epoch-02", "epoch-04"]
    np.testing.assert_array_equal(series.weights("recorded"), [0.05, 0.01])
    np.testing.assert_array_equal(series.weights("equal"), [1.0, 1.0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoints": []}, "no checkpoints"),
        ({"checkpoints": [ENTRY, ENTRY]}, "'epoch-02' occurs 2 times"),
        ({"checkpoints": {}}, "'checkpoints' is {}, expected a list"),
        ({"checkpoints": [3]}, r"checkpoints\[0\] is 3"),
        ({"checkpoints": [{"id": "a", "path": "b"}]}, r"checkpoints\[0\] has no field 'step'"),
        ({"checkpoints": [{**ENTRY, "step": -1}]}, "'step' is -1"),
        ({"checkpoints": [{**ENTRY, "id": ""}]}, "checkpoint id ''"),
        ({"checkpoints": [{**ENTRY, "path": None}]}, "'path' is None"),
        ({"checkpoints": [{**ENTRY, "learning_rate": -0.1}]}, "'learning_rate' is -0.1"),
        ({"checkpoints": [{**ENTRY, "learning_rate": "x"}]}, "'learning_rate' is 'x'"),
        (
            {"checkpoints": [ENTRY, {**ENTRY, "id": "b", "step": 7}]},
            "'b' has step 7, after 'epoch-02' with 938",
        ),
        ({"loss": 3}, "'loss' is 3, expected the Keras name"),
        ({"loss_options": 3}, "'loss_options' is 3, expected an object"),
        ({"from_logits": "yes"}, "'from_logits' is 'yes'"),
        ({"format": 2}, "'format' is 2, expected 1"),
    ],
)
def test_bad_documents_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        series_from_json({**DOCUMENT, **change})


@pytest.mark.parametrize("name", ["loss", "checkpoints"])
def test_missing_fields_are_named(name):
    with pytest.raises(InputError, match=f"field '{name}' is missing"):
        series_from_json({key: value for key, value in DOCUMENT.items() if key != name})


def test_a_missing_learning_rate_names_the_flag():
    series = CheckpointSeries((Checkpoint("a", "a.keras", None, 1),), DOCUMENT["loss"], True)
    with pytest.raises(InputError, match=r"'a' has no learning rate.*--checkpoint-weights equal"):
        series.weights("recorded")
    np.testing.assert_array_equal(series.weights("equal"), [1.0])
    zero = CheckpointSeries((Checkpoint("a", "a.keras", 0.0, 1),), DOCUMENT["loss"], True)
    with pytest.raises(InputError, match="all recorded learning rates are 0"):
        zero.weights("recorded")
    with pytest.raises(InputError, match="'other': expected 'recorded' or 'equal'"):
        series.weights("other")
