"""What the benchmarks share: measured commands, and bare forward passes and reads beside them."""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

from tracin_transforms.storage.factor_shard import StoredShard

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
TRACIN = Path(sys.executable).with_name("tracin")


class Measured(NamedTuple):
    """What a command took.

    Attributes:
        seconds: From its start to its end.
        peak: Resident bytes of all its processes, at most.
        output: What it printed.
    """

    seconds: float
    peak: int
    output: str


def measure(command: Sequence[str]) -> Measured:
    """Runs a command to its end; what it writes to stderr is seen as it comes."""
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
    return Measured(seconds, peak, output[0])


def tracin(job: str, output: Path, *arguments: str) -> tuple[Measured, float]:
    """Runs a command of tracin with its result in `output`; also returns the pipeline's seconds."""
    measured = measure([str(TRACIN), job, *arguments, "--output", str(output), "--overwrite"])
    manifest = json.loads((output / "manifest.json").read_text())
    return measured, manifest["summary"]["seconds"]


def line(what: str, found: float, form: str, most: float = np.inf, least: float = -np.inf) -> None:
    """Prints one line of the table: a figure and its goal, if it has one."""
    goal = f"<= {most:{form}}" if most < np.inf else f">= {least:{form}}" if least > 0 else ""
    verdict = "" if not goal else "met" if least <= found <= most else "MISSED"
    print(f"{what:<72} {format(found, form):>10}  {goal:<10} {verdict}".rstrip(), flush=True)


def beam_options(processes: int) -> list[str]:
    """Returns the options of tracin for a number of worker processes."""
    if processes < 2:
        return []
    return ["--direct_running_mode=multi_processing", f"--direct_num_workers={processes}"]


def size_of(directory: Path) -> int:
    """Returns the bytes of all files below a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def warm(shards: list[StoredShard]) -> None:
    """Brings the factor files into the page cache."""
    bare(shards)


def drop(shards: list[StoredShard]) -> None:
    """Takes the factor files out of the page cache."""
    for shard in shards:
        with open(shard.paths.factors, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bare(shards: list[StoredShard]) -> None:
    """Reads the record batches of shards into one buffer, and nothing else."""
    for _ in bare_reads(shards):
        pass


def bare_reads(shards: list[StoredShard]) -> Iterator[tuple[StoredShard, memoryview]]:
    """Reads the record batches of shards into one buffer; yields its filled part."""
    largest = max(batch.size for shard in shards for batch in shard.sidecar.file.batches)
    buffer = memoryview(bytearray(largest))
    for shard in shards:
        with open(shard.paths.factors, "rb", buffering=0) as file:
            for batch in shard.sidecar.file.batches:
                file.seek(batch.start)
                assert file.readinto(buffer[: batch.size]) == batch.size
                yield shard, buffer[: batch.size]


def spec(path: Path) -> str:
    """Returns the SPEC of an archive with images, labels and ids."""
    return f"npz:{path}?x=images&y=labels&id=ids"


class Forward(NamedTuple):
    """Bare compiled forward passes, and nothing else, in a process of their own.

    Attributes:
        seconds: One network after the other.
        together: Two networks at a time, as tracin runs them.
        whole: The process, imports and loading included, with the first of the two.
    """

    seconds: float
    together: float
    whole: float


def bare_forward(script: str, *arguments: str) -> Forward:
    """Runs a benchmark's script with --forward-only and reads what `run_forward` printed."""
    line = [sys.executable, script, *arguments, "--forward-only"]
    return Forward(**json.loads(measure(line).output.splitlines()[-1]))


def run_forward(models: Callable[[], list[Any]], inputs: np.ndarray, batch_size: int) -> None:
    """Runs compiled models over all inputs, and prints how long that took."""
    start = time.perf_counter()
    import tensorflow as tf

    tf.get_logger().setLevel("ERROR")
    functions = []
    for model in models():
        signature = [tf.TensorSpec([None, *inputs.shape[1:]], inputs.dtype)]
        functions.append(
            tf.function(
                lambda x, m=model: m(tf.cast(x, tf.float32), training=False),
                input_signature=signature,
                autograph=False,
            )
        )
        functions[-1](inputs[:batch_size])

    def run(function: Any) -> None:
        for at in range(0, len(inputs), batch_size):
            function(inputs[at : at + batch_size]).numpy()

    first = time.perf_counter()
    for function in functions:
        run(function)
    end = time.perf_counter()
    with ThreadPoolExecutor(max_workers=2) as pool:
        list(pool.map(run, functions))
    together = time.perf_counter() - end
    print(
        json.dumps({"seconds": end - first, "together": together, "whole": end - start}), flush=True
    )


def parser(description: str | None, *positional: str) -> argparse.ArgumentParser:
    """Returns a parser of paths, with the flag that `bare_forward` uses."""
    found = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    for name in positional:
        found.add_argument(name, type=Path)
    found.add_argument("--forward-only", action="store_true", help=argparse.SUPPRESS)
    return found


def train_mnist(mnist: Path, work: Path, queries: int, layers: Callable[[], list[Any]]) -> None:
    """Writes train.npz and queries.npz from MNIST, and the run of a network with these layers.

    Unless that was done before.
    """
    import keras

    from tracin_transforms import CheckpointRecorder

    if (work / "run" / "epoch-012.keras").exists():
        return
    work.mkdir(parents=True, exist_ok=True)
    with np.load(mnist) as data:
        images, labels = data["train_images"], data["train_labels"].astype(np.int64)
        tests, test_labels = data["test_images"], data["test_labels"].astype(np.int64)
    ids = np.array([f"mnist-{i:05d}" for i in range(len(images))])
    np.savez(work / "train.npz", images=images, labels=labels, ids=ids)
    np.savez(
        work / "queries.npz",
        images=tests[:queries],
        labels=test_labels[:queries],
        ids=np.array([f"test-{i:05d}" for i in range(queries)]),
    )
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((28, 28)), keras.layers.Rescaling(1 / 255), *layers()])
    model.compile(
        keras.optimizers.SGD(0.05), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    print(f"training a network with {model.count_params():,} parameters", flush=True)
    recorder = CheckpointRecorder(work / "run", every=2)
    model.fit(images, labels, batch_size=128, epochs=12, verbose=0, callbacks=[recorder])


def load_models(run: Path) -> list[Any]:
    """Returns the models of a run's checkpoints, in order."""
    import keras

    return [keras.saving.load_model(path, compile=False) for path in sorted(run.glob("*.keras"))]


def softmax_errors(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns softmax(logits) - onehot(labels) in float64; a label's entry is −Σ of the others."""
    p = np.exp(logits - logits.max(1, keepdims=True))
    total, rows = p.sum(1, keepdims=True), np.arange(len(p))
    p[rows, labels] = 0
    p /= total
    p[rows, labels] = -p.sum(1)
    return p


def report_rankings(
    directory: Path, ids: np.ndarray, query_ids: np.ndarray, influence: np.ndarray, k: int
) -> None:
    """Prints how far an influence result is from all scores [n, q], sorted in full."""
    import pyarrow.parquet as pq

    rows = pq.read_table(next(directory.glob("influence-*.parquet"))).to_pylist()
    found: dict[tuple[str, str], list[str]] = {}
    position = {name: i for i, name in enumerate(ids)}
    query_position = {name: i for i, name in enumerate(query_ids)}
    worst, largest = 0.0, np.abs(influence).max(axis=0)
    for row in rows:
        found.setdefault((row["query_id"], row["direction"]), []).append(row["example_id"])
        q = query_position[row["query_id"]]
        exact = influence[position[row["example_id"]], q]
        worst = max(worst, abs(row["influence"] - exact) / largest[q])
    same = {"proponent": 0, "opponent": 0}
    for q, name in enumerate(query_ids):
        order = np.argsort(-influence[:, q], kind="stable")
        ends = {"proponent": order[:k], "opponent": order[::-1][:k]}
        for direction, expected in ends.items():
            same[direction] += found.get((name, direction), []) == list(ids[expected])
    print(
        f"influence: largest error {worst:.2e} of the query's largest |influence| (goal 1e-6); "
        f"same top {k} in the same order: {same['proponent']} and {same['opponent']} of "
        f"{len(query_ids)} queries (proponents, opponents)",
        flush=True,
    )


def report_options(
    work: Path, common: Sequence[str], few: Path, expected: np.ndarray, kinds: Sequence[str]
) -> None:
    """Prints what options that change the rounding do to the influence of a few examples.

    Args:
        work: Where results go.
        common: Arguments of `tracin influence` without examples and queries.
        few: Archive of n examples, which are also the queries.
        expected: Their influence on each other, shape [n, n].
        kinds: Options to try, with spaces between their parts; empty for none.
    """
    import pyarrow.parquet as pq

    place = {str(name): i for i, name in enumerate(np.load(few)["ids"])}
    pairs = ["--examples", spec(few), "--queries", spec(few), "--k", str(len(place))]
    for kind in kinds:
        tracin("influence", work / "options", *common, *pairs, *kind.split())
        found = np.full_like(expected, np.nan)
        for row in pq.read_table(next((work / "options").glob("*.parquet"))).to_pylist():
            found[place[row["example_id"]], place[row["query_id"]]] = row["influence"]
        off = np.abs(found - expected).max(axis=0) / np.abs(expected).max(axis=0)
        print(
            f"influence {kind or 'as saved'}: {len(place)} x {len(place)} pairs, off by at most "
            f"{off.max():.1e} of the query's largest (goal 1e-6)",
            flush=True,
        )
