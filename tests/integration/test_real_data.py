"""Text and regression, on real data, from training to the proponents of a query."""

from pathlib import Path

import keras
import numpy as np
import pyarrow.parquet as pq
import pytest
import tensorflow as tf

from tests.integration.conftest import tracin
from tests.models.conftest import batch_of
from tests.models.reference import example_gradients, load_model
from tracin_transforms.models.recorder import CheckpointRecorder
from tracin_transforms.storage.checkpoint_series import read_checkpoint_series

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
QUERIES, K = 12, 30


def _columns(name, *columns):
    if not (DATA / name).exists():
        pytest.skip(f"{name} is not beside this clone, in shared/data")
    table = pq.read_table(DATA / name, columns=list(columns) or None).drop_null()
    return [np.array(column.to_pylist()) for column in table.columns]


def _train(directory, model, inputs, targets, **options):
    """Records a run and writes the last rows as queries, the others as training examples."""
    ids = np.array([f"row-{i}" for i in range(len(targets))])
    parts = {"train": slice(0, -QUERIES), "queries": slice(-QUERIES, None)}
    for name, rows in parts.items():
        np.savez(directory / f"{name}.npz", x=inputs[rows], y=targets[rows], id=ids[rows])
    recorder = CheckpointRecorder(directory / "run")
    # As a tensor: Keras takes no NumPy strings.
    x, y = tf.constant(inputs[parts["train"]]), targets[parts["train"]]
    model.fit(x, y, epochs=3, verbose=0, callbacks=[recorder], **options)


def _influence(directory, *more):
    arguments = {
        "--checkpoints": directory / "run",
        "--examples": f"npz:{directory / 'train.npz'}?id=id",
        "--queries": f"npz:{directory / 'queries.npz'}?id=id",
        "--output": directory / "influence",
        "--k": K,
    }
    done = tracin("influence", arguments, *more)
    assert done.returncode == 0, done.stderr
    (path,) = (directory / "influence").glob("*.parquet")
    return pq.read_table(path).to_pylist()


def _assert_gradients_agree(directory, rows, inputs, targets, loss, variables):
    """Compares what was found for one query with gradients of the whole model, materialised."""
    query = rows[0]["query_id"]
    rows = [row for row in rows if row["query_id"] == query]
    places = [int(name.removeprefix("row-")) for name in [query] + [r["example_id"] for r in rows]]
    batch = batch_of(inputs[places], targets[places])
    found = np.array([row["per_checkpoint"] for row in rows])
    expected = np.zeros_like(found)
    for k, checkpoint in enumerate(read_checkpoint_series(directory / "run").checkpoints):
        model = load_model(checkpoint)
        gradients = example_gradients(model, batch, variables(model), loss)
        matrix = np.hstack([part.reshape(len(batch), -1).astype(np.float64) for part in gradients])
        expected[:, k] = checkpoint.learning_rate * matrix[1:] @ matrix[0]
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_text(tmp_path):
    """Which reviews are behind a department's prediction? Embedding, pooling and dense layer."""
    texts, departments = _columns("clothing_reviews.parquet", "Review Text", "Department Name")
    texts, departments = texts[:4000], departments[:4000]
    names, labels = np.unique(departments, return_inverse=True)
    keras.utils.set_random_seed(0)
    words = keras.layers.TextVectorization(3000, output_sequence_length=60)
    words.adapt(texts)
    model = keras.Sequential(
        [
            keras.Input((), dtype="string"),
            words,
            keras.layers.Embedding(3000, 16, mask_zero=True),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(len(names), activation="softmax"),
        ]
    )
    model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy")
    _train(tmp_path, model, texts, labels)
    rows = _influence(tmp_path, "--layers=all")
    loss = keras.losses.SparseCategoricalCrossentropy()
    _assert_gradients_agree(
        tmp_path, rows, texts, labels, loss, lambda model: model.trainable_variables
    )
    query_labels = dict(
        zip([f"row-{i}" for i in range(4000 - QUERIES, 4000)], labels[-QUERIES:], strict=True)
    )
    supporting = [row for row in rows if row["direction"] == "proponent"]
    same = np.mean([row["label"] == query_labels[row["query_id"]] for row in supporting])
    chance = np.mean([np.mean(labels == label) for label in query_labels.values()])
    assert same > 0.9 > chance


def test_regression(tmp_path):
    """Which houses are behind a price? Mean squared error."""
    *features, prices = _columns("california_housing.parquet")
    inputs, prices = np.stack(features, axis=1).astype(np.float32), prices.astype(np.float32)
    keras.utils.set_random_seed(0)
    scaled = keras.layers.Normalization()
    scaled.adapt(inputs)
    model = keras.Sequential(
        [
            keras.Input((8,)),
            scaled,
            keras.layers.Dense(32, activation="relu"),
            keras.layers.Dense(16, activation="relu"),
            keras.layers.Dense(1),
        ]
    )
    model.compile(keras.optimizers.Adam(0.003), "mean_squared_error")
    _train(tmp_path, model, inputs, prices, batch_size=128)
    rows = _influence(tmp_path, "--layers=all-dense")
    # Keras gives a loss for each example where prediction and target have an axis of one value.
    _assert_gradients_agree(
        tmp_path,
        rows,
        inputs,
        prices[:, None],
        keras.losses.MeanSquaredError(),
        lambda model: model.trainable_variables,
    )
    assert {row["direction"] for row in rows} == {"proponent", "opponent"}
    assert len(rows) == 2 * K * QUERIES
    place = {f"row-{i}": i for i in range(len(prices))}
    for row in rows[:5]:
        assert row["label"] == pytest.approx(float(prices[place[row["example_id"]]]))
