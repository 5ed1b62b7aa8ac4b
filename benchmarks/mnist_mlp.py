"""MNIST with the paper's network, all of its layers: the whole model's influence, exactly.

    .venv/bin/python benchmarks/mnist_mlp.py MNIST.npz WORK_DIR

Pruthi et al. (2020) use an MLP with three hidden layers and 240,000 parameters, and project its
gradients. Here, 60,000 examples at 6 checkpoints are compared with 200 queries from the gradient
factors of all four layers, and checked against float64: the network, its error signals and all
products by NumPy alone, sorted in full. Materialised, the gradients would be 60,000 x 6 x 242,762
numbers of 4 bytes, 350 GB.
"""

import json
from pathlib import Path

import numpy as np
from measure import (
    bare_forward,
    load_models,
    parser,
    report_rankings,
    run_forward,
    softmax_errors,
    spec,
    tracin,
    train_mnist,
)

QUERIES = 200
K = 20
WIDTHS = (256, 128, 64)


def main() -> None:
    """Prepares, runs, compares and prints."""
    options = parser(__doc__, "mnist", "work").parse_args()
    if options.forward_only:
        with np.load(options.work / "train.npz") as data:
            run_forward(lambda: load_models(options.work / "run"), data["images"], 512)
        return
    train_mnist(options.mnist, options.work, QUERIES, network)
    before = bare_forward(__file__, str(options.mnist), str(options.work))
    common = ["--checkpoints", str(options.work / "run"), "--layers", "all-dense"]
    common += ["--examples", spec(options.work / "train.npz")]
    queries = ["--queries", spec(options.work / "queries.npz"), "--k", str(K)]
    for job, more in (("self-influence", []), ("influence", queries)):
        measured, pipeline = tracin(job, options.work / job, *common, *more)
        print(
            f"{job}, all layers: {pipeline:.1f} s for the pipeline, {measured.seconds:.1f} s for "
            f"the whole command, {measured.peak / 1e9:.2f} GB; the bare forward passes alone "
            f"{before.seconds:.1f} s",
            flush=True,
        )
    report_exactness(options.work)


def network() -> list[object]:
    """Returns the layers of an MLP."""
    from keras import layers

    hidden = [layers.Dense(width, activation="relu") for width in WIDTHS]
    return [layers.Flatten(), *hidden, layers.Dense(10)]


def report_exactness(work: Path) -> None:
    """Compares both results with float64."""
    import pyarrow.parquet as pq

    series = json.loads((work / "run" / "checkpoints.json").read_text())["checkpoints"]
    with np.load(work / "train.npz") as data:
        ids, images, labels = data["ids"], data["images"], data["labels"]
    with np.load(work / "queries.npz") as data:
        query_ids, query_images, query_labels = data["ids"], data["images"], data["labels"]
    influence = np.zeros((len(ids), len(query_ids)))
    own = np.zeros(len(ids))
    for entry in series:
        checkpoint = work / "run" / entry["path"]
        for (e, h), (f, g) in zip(
            _reference_factors(checkpoint, images, labels),
            _reference_factors(checkpoint, query_images, query_labels),
            strict=True,
        ):
            influence += entry["learning_rate"] * (e @ f.T) * (h @ g.T + 1)
            own += entry["learning_rate"] * (e**2).sum(1) * ((h**2).sum(1) + 1)
    table = pq.read_table(next((work / "self-influence").glob("self_influence-*.parquet")))
    found = {row["example_id"]: row["self_influence"] for row in table.to_pylist()}
    relative = np.abs(np.array([found[name] for name in ids]) / own - 1)
    print(f"self-influence: largest relative error {relative.max():.2e} (goal 2e-5)", flush=True)
    report_rankings(work / "influence", ids, query_ids, influence, K)


def _reference_factors(
    checkpoint: Path, images: np.ndarray, labels: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns error signals and activations of each layer in float64, by NumPy alone."""
    import keras

    weights = [
        w.astype(np.float64)
        for w in keras.saving.load_model(checkpoint, compile=False).get_weights()
    ]
    kernels, biases = weights[::2], weights[1::2]
    activations = [images.reshape(len(images), -1) * np.float64(np.float32(1 / 255))]
    for kernel, bias in zip(kernels[:-1], biases[:-1], strict=True):
        activations.append(np.maximum(activations[-1] @ kernel + bias, 0))
    errors = [softmax_errors(activations[-1] @ kernels[-1] + biases[-1], labels)]
    for kernel, activation in zip(reversed(kernels[1:]), reversed(activations[1:]), strict=True):
        errors.append(errors[-1] @ kernel.T * (activation > 0))
    return list(zip(reversed(errors), activations, strict=True))


if __name__ == "__main__":
    main()
