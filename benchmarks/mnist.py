"""MNIST, 60,000 x 6 checkpoints: exactness against float64, time against bare forward passes.

    .venv/bin/python benchmarks/mnist.py MNIST.npz WORK_DIR

MNIST.npz holds train_images [60000, 28, 28] uint8, train_labels, test_images and test_labels.
Trains a CNN with 206,922 parameters (kept in WORK_DIR for the next time), runs both commands as a
user would, and compares them with a reference that shares no code with this project: the network
is evaluated by NumPy in float64, and all scores are sorted in full.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
QUERIES = 200
K = 20
TRACIN = Path(sys.executable).with_name("tracin")


def main() -> None:
    """Prepares, runs, compares and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("mnist", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--forward-only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.forward_only:
        bare_forward(options.work)
        return
    prepare(options.mnist, options.work)
    report_speed(options)
    report_exactness(options.work)


def prepare(mnist: Path, work: Path) -> None:
    """Writes train.npz and queries.npz and trains the network, unless that was done before."""
    import keras

    from tracin_transforms import CheckpointRecorder

    if (work / "run" / "epoch-012.keras").exists():
        return
    work.mkdir(parents=True, exist_ok=True)
    with np.load(mnist) as data:
        images, labels = data["train_images"], data["train_labels"].astype(np.int64)
        queries, query_labels = data["test_images"], data["test_labels"].astype(np.int64)
    ids = np.array([f"mnist-{i:05d}" for i in range(len(images))])
    query_ids = np.array([f"test-{i:05d}" for i in range(QUERIES)])
    np.savez(work / "train.npz", images=images, labels=labels, ids=ids)
    np.savez(
        work / "queries.npz",
        images=queries[:QUERIES],
        labels=query_labels[:QUERIES],
        ids=query_ids,
    )
    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((28, 28)),
            layers.Rescaling(1 / 255),
            layers.Reshape((28, 28, 1)),
            layers.Conv2D(16, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(128, activation="relu"),
            layers.Dense(10),
        ]
    )
    model.compile(
        keras.optimizers.SGD(0.05),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    print(f"training a CNN with {model.count_params():,} parameters", flush=True)
    recorder = CheckpointRecorder(work / "run", every=2)
    model.fit(images, labels, batch_size=128, epochs=12, verbose=0, callbacks=[recorder])
    accuracy = model.evaluate(queries, query_labels, verbose=0)[1]
    print(f"test accuracy {accuracy:.4f}", flush=True)


def report_speed(options: argparse.Namespace) -> None:
    """Times both commands as whole processes, and bare forward passes before and after."""
    work = options.work
    examples = ["--checkpoints", str(work / "run"), "--examples", _spec(work / "train.npz")]
    jobs = {
        "self-influence": [],
        "influence": ["--queries", _spec(work / "queries.npz"), "--k", str(K)],
    }
    bare = [sys.executable, __file__, str(options.mnist), str(work), "--forward-only"]
    for job, more in jobs.items():
        before = json.loads(_measure(bare)[2])
        output = str(work / job)
        seconds, peak, _ = _measure(
            [str(TRACIN), job, *examples, *more, "--output", output, "--overwrite"]
        )
        after = json.loads(_measure(bare)[2])
        forward = (before["forward"] + after["forward"]) / 2
        whole = (before["whole"] + after["whole"]) / 2
        pipeline = json.loads((work / job / "manifest.json").read_text())["summary"]["seconds"]
        print(
            f"{job}: {pipeline:.1f} s for the pipeline, bare forward passes {forward:.1f} s: "
            f"throughput {forward / pipeline:.2f} of bare. Whole process {seconds:.1f} s, bare "
            f"process with imports and loading {whole:.1f} s: {whole / seconds:.2f}. "
            f"Peak memory {peak / 1e9:.2f} GB",
            flush=True,
        )


def bare_forward(work: Path) -> None:
    """Runs the compiled models over the training images, and nothing else."""
    start = time.perf_counter()
    import keras
    import tensorflow as tf

    with np.load(work / "train.npz") as data:
        images = data["images"]
    paths = sorted((work / "run").glob("*.keras"))
    functions = []
    tf.get_logger().setLevel("ERROR")
    for path in paths:
        model = keras.saving.load_model(path, compile=False)
        signature = [tf.TensorSpec([None, 28, 28], tf.uint8)]
        functions.append(
            tf.function(lambda x, m=model: m(tf.cast(x, tf.float32)), input_signature=signature)
        )
        functions[-1](images[:512])
    first = time.perf_counter()
    for function in functions:
        for at in range(0, len(images), 512):
            function(images[at : at + 512]).numpy()
    end = time.perf_counter()
    print(json.dumps({"forward": end - first, "whole": end - start}))


def report_exactness(work: Path) -> None:
    """Compares both results with the float64 reference."""
    series = json.loads((work / "run" / "checkpoints.json").read_text())["checkpoints"]
    with np.load(work / "train.npz") as data:
        ids, images, labels = data["ids"], data["images"], data["labels"]
    with np.load(work / "queries.npz") as data:
        query_ids, query_images, query_labels = data["ids"], data["images"], data["labels"]
    influence = np.zeros((len(ids), len(query_ids)))
    own = np.zeros(len(ids))
    for entry in series:
        rate = entry["learning_rate"]
        e, h = _reference_factors(work / "run" / entry["path"], images, labels)
        f, g = _reference_factors(work / "run" / entry["path"], query_images, query_labels)
        influence += rate * (e @ f.T) * (h @ g.T + 1)
        own += rate * (e**2).sum(1) * ((h**2).sum(1) + 1)

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
    _report_influence(work, ids, query_ids, influence)


def _report_influence(
    work: Path, ids: np.ndarray, query_ids: np.ndarray, influence: np.ndarray
) -> None:
    rows = pq.read_table(next((work / "influence").glob("influence-*.parquet"))).to_pylist()
    found: dict[tuple[str, str], list[str]] = {}
    position = {name: i for i, name in enumerate(ids)}
    query_position = {name: i for i, name in enumerate(query_ids)}
    worst = 0.0
    largest = np.abs(influence).max(axis=0)
    for row in rows:
        found.setdefault((row["query_id"], row["direction"]), []).append(row["example_id"])
        q = query_position[row["query_id"]]
        exact = influence[position[row["example_id"]], q]
        worst = max(worst, abs(row["influence"] - exact) / largest[q])
    same = {"proponent": 0, "opponent": 0}
    for q, name in enumerate(query_ids):
        order = np.argsort(-influence[:, q], kind="stable")
        ends = {"proponent": order[:K], "opponent": order[::-1][:K]}
        for direction, expected in ends.items():
            same[direction] += found.get((name, direction), []) == list(ids[expected])
    print(
        f"influence: largest error {worst:.2e} of the query's largest |influence| (goal 1e-6); "
        f"same top {K} in the same order: {same['proponent']} and {same['opponent']} of "
        f"{len(query_ids)} queries (proponents, opponents)"
    )


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
        logits = h @ w4 + b4
        p = np.exp(logits - logits.max(1, keepdims=True))
        target = labels[at : at + 1000]
        rows = np.arange(len(p))
        p[rows, target] = 0
        total = np.exp(logits - logits.max(1, keepdims=True)).sum(1)
        p /= total[:, None]
        p[rows, target] = -p.sum(1)
        errors.append(p)
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


def _measure(command: list[str]) -> tuple[float, int, str]:
    """Returns seconds, peak resident bytes of the process tree, and what it printed."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = 0
    tree = psutil.Process(process.pid)
    output: list[str] = []
    reader = threading.Thread(target=lambda: output.append(process.stdout.read()))
    reader.start()
    while process.poll() is None:
        try:
            members = [tree, *tree.children(recursive=True)]
            peak = max(peak, sum(member.memory_info().rss for member in members))
        except psutil.NoSuchProcess:
            pass
        time.sleep(0.05)
    seconds = time.perf_counter() - start
    reader.join()
    if process.returncode:
        raise SystemExit(f"failed: {' '.join(command)}")
    return seconds, peak, output[0]


def _spec(path: Path) -> str:
    return f"npz:{path}?x=images&y=labels&id=ids"


if __name__ == "__main__":
    main()
