import keras
import numpy as np
import pytest

from tracin_transforms.core.checkpoints import Checkpoint, CheckpointSeries
from tracin_transforms.core.protocols import ExampleBatch

SPARSE = "sparse_categorical_crossentropy"


@pytest.fixture(autouse=True)
def _seeded():
    keras.utils.set_random_seed(0)


def batch_of(inputs, targets, ids=None):
    if ids is None:
        ids = np.array([f"z{i:03d}" for i in range(len(targets))])
    return ExampleBatch("shard-0", np.arange(len(ids)), ids, inputs, targets)


def image_batch(n=40, one_hot=False, seed=0):
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 5, n)
    return batch_of(
        rng.standard_normal((n, 6, 6, 2)).astype(np.float32),
        np.eye(5)[targets] if one_hot else targets,
    )


def conv_model(end="linear", bias=True):
    """A network with the layers that behave otherwise while training."""
    layers = keras.layers
    head = {
        "linear": [layers.Dense(5, use_bias=bias, name="logits")],
        "dense softmax": [layers.Dense(5, use_bias=bias, activation="softmax", name="logits")],
        "softmax layer": [layers.Dense(5, use_bias=bias, name="logits"), layers.Softmax()],
        "activation layer": [
            layers.Dense(5, use_bias=bias, name="logits"),
            layers.Activation("softmax"),
        ],
    }[end]
    model = keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layers.Conv2D(4, 3, activation="relu"),
            layers.BatchNormalization(),
            layers.Flatten(),
            layers.Dropout(0.5),
            layers.Dense(7, activation="tanh"),
            *head,
        ]
    )
    for variable in model.weights:
        if "moving" in variable.path or "bias" in variable.path:
            variable.assign(np.random.default_rng(1).random(variable.shape) + 0.1)
    return model


def save_series(directory, models, loss=SPARSE, from_logits=True):
    checkpoints = []
    for k, model in enumerate(models):
        path = directory / f"epoch-{k}.keras"
        model.save(path)
        checkpoints.append(Checkpoint(f"epoch-{k}", str(path), 0.1, k))
    return CheckpointSeries(tuple(checkpoints), loss, from_logits)
