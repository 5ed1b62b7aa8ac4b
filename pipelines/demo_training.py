"""The demo's data and network: handwritten digits, some with a wrong label, and a small CNN."""

from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
from sklearn.datasets import load_digits

from tracin_transforms.core.cleaning import flip_to_most_likely_wrong
from tracin_transforms.models.recorder import CheckpointRecorder

TEST_SIZE = 500
FLIPPED_SHARE = 0.1
EPOCHS = 20
RECORDED_EPOCHS = (4, 6, 8, 10, 12, 16, 20)


@dataclass(frozen=True, eq=False)
class Digits:
    """Training and test digits.

    Attributes:
        ids: Ids of the training digits, shape [n], unicode.
        images: Training images, shape [n, 8, 8], uint8, 0 (white) to 16 (black).
        labels: Labels as given, some of them wrong, shape [n], int64.
        true_labels: Labels before some were flipped, shape [n], int64.
        flipped: Where the two differ, shape [n], bool.
        test_ids: Ids of the test digits, shape [m], unicode.
        test_images: Shape [m, 8, 8], uint8.
        test_labels: All of them right, shape [m], int64.
    """

    ids: np.ndarray
    images: np.ndarray
    labels: np.ndarray
    true_labels: np.ndarray
    flipped: np.ndarray
    test_ids: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load_flipped_digits(seed: int) -> Digits:
    """Returns scikit-learn's digits, 10 % of the training labels changed.

    The protocol of Pruthi et al. (2020), section 5.1: a network trained on the right labels says
    which wrong class is the most likely, and that becomes the label.
    """
    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.images))
    test, training = order[:TEST_SIZE], order[TEST_SIZE:]
    images, labels = data.images.astype(np.uint8), data.target.astype(np.int64)
    clean = train(images[training], labels[training], seed)
    given, flipped = flip_to_most_likely_wrong(
        labels[training],
        clean.predict(images[training], verbose=0),
        FLIPPED_SHARE,
        np.random.default_rng(seed),
    )
    return Digits(
        ids=_ids(training),
        images=images[training],
        labels=given,
        true_labels=labels[training],
        flipped=flipped,
        test_ids=_ids(test),
        test_images=images[test],
        test_labels=labels[test],
    )


def train(
    images: np.ndarray, labels: np.ndarray, seed: int, run: Path | None = None
) -> keras.Model:
    """Trains the CNN; records its checkpoints in `run` if that is given."""
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((8, 8)),
            layers.Rescaling(1 / 16),
            layers.Reshape((8, 8, 1)),
            layers.Conv2D(16, 3, padding="same", activation="relu"),
            layers.Conv2D(32, 3, strides=2, padding="same", activation="relu"),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(10, name="logits"),
        ]
    )
    model.compile(
        keras.optimizers.SGD(0.05, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    recorders = [] if run is None else [CheckpointRecorder(run, epochs=RECORDED_EPOCHS)]
    model.fit(images, labels, batch_size=64, epochs=EPOCHS, verbose=0, callbacks=recorders)
    return model


def accuracy(model: keras.Model, digits: Digits) -> float:
    """Returns the share of the test digits that the model reads right."""
    predictions = model.predict(digits.test_images, verbose=0).argmax(axis=1)
    return float((predictions == digits.test_labels).mean())


def _ids(rows: np.ndarray) -> np.ndarray:
    return np.array([f"digit-{row:04d}" for row in rows])
