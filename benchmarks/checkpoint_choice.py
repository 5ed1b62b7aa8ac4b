"""Do the checkpoints that `tracin checkpoints` proposes find more flipped labels than others?

    .venv/bin/python benchmarks/checkpoint_choice.py MNIST.npz CIFAR10.npz WORK_DIR

10 % of the labels of 10,000 MNIST digits and of a CIFAR-10 subset become the most likely wrong one
(the protocol of Pruthi et al. 2020, section 5.1), a CNN is trained on them for 20 epochs, each
recorded, and the flipped labels are sought by self-influence over 3 of the 20 checkpoints: the
average precision by rule, over 3 seeds. The validation loss is that of 1,000 examples with right
labels.
"""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from measure import parser, spec, tracin

SEEDS = 3
EPOCHS = 20
CHOSEN = 3
SHARE = 0.1
VALIDATION = 1000


def main() -> None:
    """Trains, ranks and prints."""
    options = parser(__doc__, "mnist", "cifar", "work").parse_args()
    for name, file, limit in (("MNIST", options.mnist, 10_000), ("CIFAR-10", options.cifar, None)):
        found: dict[str, list[float]] = {}
        for seed in range(SEEDS):
            work = options.work / f"{file.stem}-{seed}"
            flipped = prepare(file, limit, work, seed)
            for rule, precision in precisions(work, flipped).items():
                found.setdefault(rule, []).append(precision)
        print(f"{name}: average precision of flipped labels, {SEEDS} seeds and their mean")
        for rule, values in found.items():
            each = "  ".join(f"{value:.3f}" for value in values)
            print(f"  {rule:<32} {each}   {np.mean(values):.3f}", flush=True)


def prepare(file: Path, limit: int | None, work: Path, seed: int) -> np.ndarray:
    """Flips labels, trains and records, unless that was done before; returns which were flipped."""
    import keras

    from tracin_transforms import CheckpointRecorder
    from tracin_transforms.core.cleaning import flip_to_most_likely_wrong

    if (work / "flipped.npy").exists():
        return np.load(work / "flipped.npy")
    work.mkdir(parents=True, exist_ok=True)
    with np.load(file) as data:
        images, labels = data["train_images"][:limit], data["train_labels"].astype(int)[:limit]
        check = data["test_images"][:VALIDATION], data["test_labels"].astype(int)[:VALIDATION]
    images, check = _with_channels(images), (_with_channels(check[0]), check[1])
    keras.utils.set_random_seed(seed)
    clean = _network(images.shape[1:])
    clean.fit(images, labels, batch_size=64, epochs=EPOCHS // 2, verbose=0)
    given, flipped = flip_to_most_likely_wrong(
        labels, clean.predict(images, verbose=0), SHARE, np.random.default_rng(seed)
    )
    ids = np.array([f"z{i:05d}" for i in range(len(images))])
    np.savez(work / "train.npz", images=images, labels=given, ids=ids)
    keras.utils.set_random_seed(seed + 100)
    recorder = CheckpointRecorder(work / "run")
    _network(images.shape[1:]).fit(
        images,
        given,
        batch_size=64,
        epochs=EPOCHS,
        validation_data=check,
        verbose=0,
        callbacks=[recorder],
    )
    np.save(work / "flipped.npy", flipped)
    return flipped


def precisions(work: Path, flipped: np.ndarray) -> dict[str, float]:
    """Returns the average precision of self-influence over the checkpoints of each choice."""
    from tracin_transforms import read_checkpoint_series
    from tracin_transforms.core.checkpoint_choice import RULES, propose, summarise
    from tracin_transforms.core.evaluation import average_precision

    common = ["--checkpoints", str(work / "run"), "--examples", spec(work / "train.npz")]
    tracin("self-influence", work / "self-influence", *common)
    table = pq.read_table(next((work / "self-influence").glob("*.parquet")))
    parts = np.array(table["per_checkpoint"].to_pylist())
    rows = np.array([int(name[1:]) for name in table["example_id"].to_pylist()])
    series = read_checkpoint_series(work / "run")
    place = {checkpoint.id: k for k, checkpoint in enumerate(series.checkpoints)}
    summaries = summarise(series, series.weights("recorded"))
    choices = {
        f"{CHOSEN} by {rule}": [place[c.id] for c in propose(summaries, CHOSEN, rule)]
        for rule in RULES
    }
    choices |= {f"all {len(place)}": list(place.values()), "the last": [len(place) - 1]}
    return {
        rule: average_precision(flipped[rows[np.argsort(-parts[:, chosen].sum(axis=1))]])
        for rule, chosen in choices.items()
    }


def _network(shape: tuple[int, ...]) -> object:
    import keras

    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input(shape),
            layers.Rescaling(1 / 255),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(128, activation="relu"),
            layers.Dense(10),
        ]
    )
    model.compile(
        keras.optimizers.SGD(0.02, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


def _with_channels(images: np.ndarray) -> np.ndarray:
    return images[..., None] if images.ndim == 3 else images


if __name__ == "__main__":
    main()
