"""MNIST, 60,000 x 6 checkpoints: exactness against float64, time against bare forward passes.

    .venv/bin/python benchmarks/mnist.py MNIST.npz WORK_DIR

MNIST.npz holds train_images [60000, 28, 28] uint8, train_labels, test_images and test_labels.
Trains a CNN with 206,922 parameters (kept in WORK_DIR for the next time), runs both commands as a
user would, and compares them with a reference that shares no code with this project: the network
is evaluated by NumPy in float64, and all scores are sorted in full.
"""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from measure import (
    bare_forward,
    load_models,
    parser,
    report_options,
    report_rankings,
    run_forward,
    softmax_errors,
    spec,
    tracin,
    train_mnist,
)

QUERIES = 200
K = 20
BATCH_SIZE = 512
# Those that change the rounding of the network's forward passes.
OPTIONS = (
    "",
    "--precision float64",
    "--xla",
    "--precision mixed_bfloat16",
    "--precision mixed_float16",
)


def main() -> None:
    """Prepares, runs, compares and prints."""
    options = parser(__doc__, "mnist", "work").parse_args()
    if options.forward_only:
        with np.load(options.work / "train.npz") as data:
            run_forward(lambda: load_models(options.work / "run"), data["images"], BATCH_SIZE)
        return
    train_mnist(options.mnist, options.work, QUERIES, network)
    report_speed(options.mnist, options.work)
    report_exactness(options.work)


def network() -> list[object]:
    """Returns the layers of a CNN."""
    from keras import layers

    return [
        layers.Reshape((28, 28, 1)),
        layers.Conv2D(16, 3, padding="same", activation="relu"),
        layers.MaxPooling2D(),
        layers.Conv2D(32, 3, padding="same", activation="relu"),
        layers.MaxPooling2D(),
        layers.Flatten(),
        layers.Dense(128, activation="relu"),
        layers.Dense(10),
    ]


def report_speed(mnist: Path, work: Path) -> None:
    """Times both commands as whole processes, and bare forward passes before and after."""
    common = ["--checkpoints", str(work / "run"), "--examples", spec(work / "train.npz")]
    jobs = {
        "self-influence": common,
        "influence": [*common, "--queries", spec(work / "queries.npz"), "--k", str(K)],
    }
    for job, arguments in jobs.items():
        before = bare_forward(__file__, str(mnist), str(work))
        measured, pipeline = tracin(job, work / job, *arguments)
        after = bare_forward(__file__, str(mnist), str(work))
        forward, together, whole = ((a + b) / 2 for a, b in zip(before, after, strict=True))
        print(
            f"{job}: {pipeline:.1f} s for the pipeline; bare forward passes {forward:.1f} s: "
            f"throughput {forward / pipeline:.2f} of bare ({together / pipeline:.2f} of two "
            f"networks at a time). Whole command {measured.seconds:.1f} s, of which "
            f"{measured.seconds - pipeline:.1f} s before and after the pipeline; bare process "
            f"with imports and loading {whole:.1f} s: {whole / measured.seconds:.2f}. Peak memory "
            f"{measured.peak / 1e9:.2f} GB",
            flush=True,
        )


def report_exactness(work: Path) -> None:
    """Compares both results with the float64 reference."""
    with np.load(work / "train.npz") as data:
        ids = data["ids"]
    with np.load(work / "queries.npz") as data:
        query_ids = data["ids"]
    influence, among_queries, own = reference_scores(work)

    table = pq.read_table(next((work / "self-influence").glob("self_influence-*.parquet")))
    found_ids = table["example_id"].to_numpy(zero_copy_only=False).astype(str)
    once = len(found_ids) == len(ids) and set(found_ids) == set(ids)
    position = {name: i for i, name in enumerate(ids)}
    rows = np.array([position[name] for name in found_ids])
    relative = np.abs(table["self_influence"].to_numpy() / own[rows] - 1)
    print(
        f"self-influence: every id exactly once: {once}; largest relative error "
        f"{relative.max():.2e} (goal 2e-5); same top 1,000: "
        f"{set(found_ids[:1000]) == set(ids[np.argsort(-own)[:1000]])}"
    )
    report_rankings(work / "influence", ids, query_ids, influence, K)
    common = ["--checkpoints", str(work / "run")]
    report_options(work, common, work / "queries.npz", among_queries, OPTIONS)


def reference_scores(work: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns scores in float64, by NumPy alone.

    Returns:
        Influence of the n training examples on the q queries, shape [n, q]; of the queries on
        each other, [q, q]; self-influence of the training examples, [n].
    """
    series = json.loads((work / "run" / "checkpoints.json").read_text())["checkpoints"]
    with np.load(work / "train.npz") as data:
        images, labels = data["images"], data["labels"]
    with np.load(work / "queries.npz") as data:
        query_images, query_labels = data["images"], data["labels"]
    influence = np.zeros((len(images), len(query_images)))
    among_queries = np.zeros((len(query_images), len(query_images)))
    own = np.zeros(len(images))
    for entry in series:
        rate = entry["learning_rate"]
        e, h = _reference_factors(work / "run" / entry["path"], images, labels)
        f, g = _reference_factors(work / "run" / entry["path"], query_images, query_labels)
        influence += rate * (e @ f.T) * (h @ g.T + 1)
        among_queries += rate * (f @ f.T) * (g @ g.T + 1)
        own += rate * (e**2).sum(1) * ((h**2).sum(1) + 1)
    return influence, among_queries, own


def _reference_factors(
    checkpoint: Path, images: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns error signals [n, 10] and activations [n, 128] in float64, by NumPy alone."""
    import keras

    weights = keras.saving.load_model(checkpoint, compile=False).get_weights()
    c1, b1, c2, b2, w3, b3, w4, b4 = (w.astype(np.float64) for w in weights)
    errors, activations = [], []
    for at in range(0, len(images), 1000):
        # Keras keeps the constant of Rescaling in float32: as the weights, it is the model's.
        x = images[at : at + 1000, :, :, None] * np.float64(np.float32(1 / 255))
        x = _pool(_conv(x, c1, b1))
        x = _pool(_conv(x, c2, b2)).reshape(len(x), -1)
        h = np.maximum(x @ w3 + b3, 0)
        errors.append(softmax_errors(h @ w4 + b4, labels[at : at + 1000]))
        activations.append(h)
    return np.concatenate(errors), np.concatenate(activations)


def _conv(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    # [n, height, width, channels, 3, 3] against kernel [3, 3, channels, filters]
    product = np.tensordot(windows, kernel.transpose(2, 0, 1, 3), axes=3)
    return np.maximum(product + bias, 0)


def _pool(x: np.ndarray) -> np.ndarray:
    n, height, width, channels = x.shape
    return x.reshape(n, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))


if __name__ == "__main__":
    main()
