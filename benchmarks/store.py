"""The factor store: exactness and speed on MNIST, reading beside bare reads, memory at a size.

    .venv/bin/python benchmarks/store.py MNIST.npz WORK_DIR [--parts mnist reading scale] [--rows N]

WORK_DIR may be that of benchmarks/mnist.py, whose network is trained unless that was done. The
other parts write synthetic stores of ImageNet's shape, with 2,048 activations and 1,000 error
signals at each of 3 checkpoints, and remove them at the end; they fill at most half of the free
disk. Goals of speed are ratios to a bare limit that is measured in turn, medians of three rounds.
"""

import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from measure import (
    TRACIN,
    Measured,
    bare,
    bare_reads,
    beam_options,
    drop,
    line,
    measure,
    parser,
    size_of,
    spec,
    tracin,
    train_mnist,
    warm,
)
from mnist import QUERIES, K, network, reference_scores

from tracin_transforms.core.factors import FactorBlock, GradientFactors, LayerFactors
from tracin_transforms.core.half_precision import unpack_rows
from tracin_transforms.core.protocols import Shard
from tracin_transforms.storage.factor_shard import StoredShard
from tracin_transforms.storage.factor_store import FactorStore
from tracin_transforms.storage.row_layout import exponent_name
from tracin_transforms.storage.shard_writer import ShardWriter
from tracin_transforms.storage.store_description import StoreDescription

PARTS = ("mnist", "reading", "scale")
ROUNDS = 3
WIDTH, CLASSES, CHECKPOINTS = 2048, 1000, ("epoch-030", "epoch-060", "epoch-090")
ROW_BYTES = 2 * len(CHECKPOINTS) * (WIDTH + CLASSES)
SHARD_ROWS, BLOCK_ROWS, SMALL, IMAGENET = 10_000, 2048, 40_000, 1_280_000


def main() -> None:
    """Runs the parts that are asked for; or, in a process of its own, one of the jobs."""
    found = parser(__doc__, "mnist", "work")
    found.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    found.add_argument("--rows", type=int, default=200_000, help="of the larger synthetic store")
    found.add_argument("--job", nargs=2, help="for itself: a job and its number")
    options = found.parse_args()
    if options.job:
        job, number = options.job
        print(json.dumps(JOBS[job](options.work, int(number))), flush=True)
        return
    options.work.mkdir(parents=True, exist_ok=True)
    print(
        f"{os.cpu_count()} cores, OPENBLAS_CORETYPE={os.environ.get('OPENBLAS_CORETYPE')}, load "
        f"{os.getloadavg()[0]:.1f}, {psutil.virtual_memory().total / 1e9:.0f} GB of memory"
    )
    if "mnist" in options.parts:
        train_mnist(options.mnist, options.work, QUERIES, network)
        report_mnist(options.work)
    try:
        if "reading" in options.parts:
            run_job("write", options.work, SMALL)
            report_reading(options.work)
        if "scale" in options.parts:
            report_scale(options.work, options.rows)
    finally:
        shutil.rmtree(options.work / "synthetic", ignore_errors=True)


def run_job(job: str, work: Path, number: int = 0) -> tuple[dict[str, float], Measured]:
    """Runs one of `JOBS` in a process of its own; returns what it printed and what it took."""
    command = [sys.executable, __file__, ".", str(work), "--job", job, str(number)]
    measured = measure(command)
    return json.loads(measured.output.splitlines()[-1]), measured


# MNIST


def report_mnist(work: Path) -> None:
    """Runs the commands through a store and without one; compares exactness, size and time."""
    common = ["--checkpoints", str(work / "run"), "--examples", spec(work / "train.npz")]
    stored = ["--store", str(work / "store")]
    queries = ["--queries", spec(work / "queries.npz"), "--k", str(K)]
    took: dict[str, list[tuple[float, float]]] = {}
    for _ in range(ROUNDS):
        took.setdefault("nothing", []).append(null_job(work))
        took.setdefault("extract", []).append(extract(work / "store", common))
        for name, job, arguments in (
            ("self-influence", "self-influence", common),
            ("influence", "influence", [*common, *queries]),
            ("stored self-influence", "self-influence", stored),
            ("stored influence", "influence", [*stored, *queries]),
        ):
            measured, pipeline = tracin(job, work / name.replace(" ", "-"), *arguments)
            took.setdefault(name, []).append((measured.seconds, pipeline))
    for name, seconds in took.items():
        whole, pipeline = np.median(seconds, axis=0)
        line(f"{name}: seconds of the whole command", whole, ".2f")
        line(f"{name}: seconds of the pipeline", pipeline, ".2f")
    wholes, pipelines = (
        {name: np.array([pair[i] for pair in seconds]) for name, seconds in took.items()}
        for i in range(2)
    )
    for kind, seconds in (("whole command", wholes), ("pipeline", pipelines)):
        ratio = median(seconds["extract"] / seconds["self-influence"])
        line(f"extract / direct self-influence, {kind}", ratio, ".3f", most=1.15)
    work_seconds = median(wholes["stored self-influence"] - wholes["nothing"])
    line("self-influence --store: seconds beyond a job that does nothing", work_seconds, ".2f", 1)
    direct = pipelines["influence"] - pipelines["nothing"]
    ratio = median(direct / (pipelines["stored influence"] - pipelines["nothing"]))
    line("influence / influence --store, pipelines without the runner", ratio, ".1f", least=10)
    report_size(work)
    report_exactness(work)


def null_job(work: Path, processes: int = 1) -> tuple[float, float]:
    """Returns seconds of the process and pipeline of a job over the store that does nothing."""
    found, measured = run_job("nothing", work, processes)
    return measured.seconds, found["seconds"]


def nothing(work: Path, processes: int) -> dict[str, float]:
    """Imports what a job over a store imports, and runs a pipeline without work.

    Args:
        work: For what it notes.
        processes: Of its workers.
    """
    import apache_beam as beam

    import pipelines.self_influence  # noqa: F401
    from pipelines.execution import Progress, run_pipeline
    from tracin_transforms.storage.job_notes import JobNotes

    def build(pipeline: beam.Pipeline) -> None:
        _ = pipeline | beam.Create(range(8)) | beam.Reshuffle() | beam.Map(str)

    with tempfile.TemporaryDirectory(dir=work) as directory:
        notes = JobNotes(Path(directory))
        notes.create()
        return {"seconds": run_pipeline(build, beam_options(processes), Progress(notes, None))}


def extract(store: Path, common: list[str]) -> tuple[float, float]:
    """Fills a store anew; returns seconds of the command and of its pipeline."""
    command = [str(TRACIN), "extract", *common, "--output", str(store), "--overwrite"]
    measured = measure(command)
    found = re.search(r"^([\d.,]+) s: ", measured.output, re.M)
    assert found is not None, measured.output
    return measured.seconds, float(found[1].replace(",", ""))


def report_size(work: Path) -> None:
    """Compares the bytes of the store with those of its bare numbers in float16."""
    store = FactorStore.open(work / "store")
    sidecars = store.stored().values()
    rows = sum(sidecar.count for sidecar in sidecars)
    layers = next(iter(sidecars)).layout.layers
    bare = 2 * sum(layer.activations[0] + layer.error_signals[0] for layer in layers)
    size = size_of(work / "store")
    line("bytes per example", size / rows, ",.0f")
    line(f"bytes per example / 2K(C+d) = {bare:,}", size / rows / bare, ".3f", most=1.05)


def report_exactness(work: Path) -> None:
    """Compares what came through the store with the float64 reference."""
    with np.load(work / "train.npz") as data:
        place = {str(name): i for i, name in enumerate(data["ids"])}
    with np.load(work / "queries.npz") as data:
        query_place = {str(name): i for i, name in enumerate(data["ids"])}
    influence, _, own = reference_scores(work)
    largest = np.abs(influence).max(axis=0)
    error, found = 0.0, {}
    for row in _rows(work / "stored-influence"):
        i, q = place[row["example_id"]], query_place[row["query_id"]]
        error = max(error, abs(row["influence"] - influence[i, q]) / largest[q])
        found.setdefault((q, row["direction"]), set()).add(i)
    line("largest error of an influence, of its query's largest", error, ".1e", most=1e-3)
    order = np.argsort(-influence, axis=0, kind="stable")
    for direction, ends in (("proponent", order[:K]), ("opponent", order[-K:])):
        overlaps = [len({*ends[:, q]} & found[q, direction]) / K for q in range(len(largest))]
        line(f"overlap of the first {K} {direction}s, mean", np.mean(overlaps), ".4f", least=0.99)
        line(f"overlap of the first {K} {direction}s, least", min(overlaps), ".4f")
    scores = {
        row["example_id"]: row["self_influence"] for row in _rows(work / "stored-self-influence")
    }
    relative = max(abs(scores[name] / own[i] - 1) for name, i in place.items())
    line("largest relative error of a self-influence", relative, ".1e", most=2e-3)


def _rows(directory: Path) -> list[dict]:
    return pq.read_table(next(directory.glob("*influence-*.parquet"))).to_pylist()


# Reading


def report_reading(work: Path) -> None:
    """Reads a store in turn with bare reads of the same files, from memory and from disk."""
    store = FactorStore.open(synthetic(work, SMALL))
    shards = [store.shard(shard.name) for shard in store.description.shards]
    size = sum(shard.sidecar.file.size for shard in shards)
    values = SMALL * ROW_BYTES / 2
    for state, prepare in (("warm", warm), ("cold", drop)):
        seconds: dict[Callable[[list[StoredShard]], None], list[float]] = {}
        for _ in range(ROUNDS):
            for read in (bare, batches, bare_unpacked, bare_converted, blocks):
                prepare(shards)
                start = time.perf_counter()
                read(shards)
                seconds.setdefault(read, []).append(time.perf_counter() - start)
        for read, took in seconds.items():
            line(f"{state}: {read.__name__}, GB/s", size / median(took) / 1e9, ".2f")
        line(f"{state}: blocks, G values/s", values / median(seconds[blocks]) / 1e9, ".2f")
        for read, limit, goal in (
            (batches, bare, 0.9),
            (blocks, bare_unpacked, 0.8),
            (blocks, bare_converted, 0),
        ):
            ratio = median(np.divide(seconds[limit], seconds[read]))
            line(f"{state}: {read.__name__}, speed of {limit.__name__}", ratio, ".2f", least=goal)


def bare_unpacked(shards: list[StoredShard]) -> None:
    """Reads as `bare` does, and makes float32 of each column with `unpack_rows`."""
    for halves, exponents in _bare_columns(shards):
        unpack_rows(halves, exponents)


def bare_converted(shards: list[StoredShard]) -> None:
    """Reads as `bare` does, and makes float32 of each column by no more than what it takes.

    In pieces that stay in a core's cache, into memory that is used again.
    """
    memory = np.empty(BLOCK_ROWS * max(WIDTH, CLASSES), np.float32)
    for halves, exponents in _bare_columns(shards):
        values = memory[: halves.size].reshape(halves.shape)
        bits, rows = values.view(np.int32), halves.view(np.int16)
        factors = np.ldexp(np.float32(1), exponents.astype(np.int32) + 112)[:, None]
        for start in range(0, len(rows), 64):
            piece = slice(start, start + 64)
            bits[piece] = rows[piece]
            bits[piece] <<= 13
            bits[piece] &= np.int32(-0x70002000)
            values[piece] *= factors[piece]


def _bare_columns(shards: list[StoredShard]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for shard, view in bare_reads(shards):
        layout = shard.sidecar.layout
        batch = pa.ipc.read_record_batch(pa.ipc.read_message(pa.py_buffer(view)), layout.schema)
        for column in layout.columns:
            halves = batch.column(column.name).values.to_numpy().reshape(-1, *column.shape)
            yield halves, batch.column(exponent_name(column)).to_numpy()


def batches(shards: list[StoredShard]) -> None:
    """Reads through `StoredShard.batches`."""
    for shard in shards:
        for _ in shard.batches():
            pass


def blocks(shards: list[StoredShard]) -> None:
    """Reads through `StoredShard.blocks`."""
    for shard in shards:
        for _ in shard.blocks(CHECKPOINTS):
            pass


# Scale


def report_scale(work: Path, rows: int) -> None:
    """Writes and reads synthetic stores of two sizes, each in a process of its own."""
    possible = shutil.disk_usage(work).free // 2 // ROW_BYTES - SMALL
    rows = min(rows, possible) // SHARD_ROWS * SHARD_ROWS
    if rows <= SMALL:
        raise SystemExit(f"--rows {rows:,}: expected more than {SMALL:,}, and disk for twice them")
    for job in ("write", "read"):
        peaks = []
        for count in (SMALL, rows):
            found, measured = run_job(job, work, count)
            peaks.append(measured.peak / 1e6)
            seconds = found["seconds"]
            line(f"{job} {count:,} rows: seconds", seconds, ",.1f")
            line(f"{job} {count:,} rows: GB/s", count * ROW_BYTES / seconds / 1e9, ".2f")
            line(f"{job} {count:,} rows: peak memory, MB", peaks[-1], ",.0f")
        line(f"{job}: MB for {rows / SMALL:.1f} times the rows", peaks[1] - peaks[0], "+,.0f")
        line(f"{job} {IMAGENET:,} rows, in proportion: seconds", seconds * IMAGENET / rows, ",.0f")
    arguments = ["--store", str(synthetic(work, rows))]
    measured, pipeline = tracin("self-influence", work / "synthetic" / "result", *arguments)
    whole, bare_pipeline = null_job(work)
    beyond = measured.seconds - whole
    line(f"self-influence --store, {rows:,} rows: seconds of the command", measured.seconds, ".1f")
    line("  of these beyond a job that does nothing", beyond, ".1f")
    line("  of these in the pipeline", pipeline - bare_pipeline, ".1f")
    line(f"  beyond, {IMAGENET:,} rows, in proportion", beyond * IMAGENET / rows, ".1f")


def synthetic(work: Path, rows: int) -> Path:
    """Returns the directory of a synthetic store."""
    return work / "synthetic" / f"{rows}"


def write(work: Path, rows: int) -> dict[str, float]:
    """Writes a synthetic store; the seconds are without those of making the factors."""
    directory = synthetic(work, rows)
    shutil.rmtree(directory, ignore_errors=True)
    shards = tuple(
        Shard(f"shard-{i:05d}", count=SHARD_ROWS, size=SHARD_ROWS)
        for i in range(rows // SHARD_ROWS)
    )
    loss = {"loss": "sparse_categorical_crossentropy", "from_logits": True, "loss_options": {}}
    rest = {"layers": "last", "precision": None, "output": None, "class_weights": {}}
    checkpoints = tuple(
        {
            "id": name,
            "path": f"{name}.keras",
            "step": i,
            "learning_rate": 0.1,
            "sha256": "0" * 64,
        }
        for i, name in enumerate(CHECKPOINTS)
    )
    loading = {"model": None, "imports": [], "network": None}
    store = FactorStore.prepare(
        directory, StoreDescription({**loss, **rest}, checkpoints, shards, loading)
    )
    base, weights = Base(), store.description.sorting_weights
    making = 0.0
    start = time.perf_counter()
    for i, shard in enumerate(shards):
        with ShardWriter(store.paths(shard.name), shard, weights, "float16") as writer:
            asked = time.perf_counter()
            for block in base.blocks(shard, i):
                making += time.perf_counter() - asked
                writer.add(block)
                asked = time.perf_counter()
            writer.finish([])
    store.finish()
    return {"seconds": time.perf_counter() - start - making}


class Base:
    """Random factors, of which rows of other norms are made for each block."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        shape = (len(CHECKPOINTS), 2 * BLOCK_ROWS)
        self._activations = np.abs(rng.standard_normal((*shape, WIDTH), dtype=np.float32))
        self._signals = rng.standard_normal((*shape, CLASSES), dtype=np.float32)

    def blocks(self, shard: Shard, seed: int) -> Iterator[FactorBlock]:
        """Yields the blocks of a shard: rows of the base, rolled, with heavy-tailed norms."""
        rng = np.random.default_rng(seed)
        for start in range(0, SHARD_ROWS, BLOCK_ROWS):
            n = min(BLOCK_ROWS, SHARD_ROWS - start)
            at = int(rng.integers(0, BLOCK_ROWS))
            indices = np.arange(start, start + n)
            scales = np.exp(2 * rng.standard_normal((len(CHECKPOINTS), n, 1), dtype=np.float32))
            yield FactorBlock(
                shard=shard.name,
                indices=indices,
                example_ids=np.array([f"{shard.name}:{i}" for i in indices]),
                labels=rng.integers(0, CLASSES, n).astype(np.int32),
                predictions=rng.integers(0, CLASSES, (n, len(CHECKPOINTS))).astype(np.int32),
                losses=rng.random((n, len(CHECKPOINTS)), dtype=np.float32),
                gradients=tuple(
                    GradientFactors(
                        name,
                        (
                            LayerFactors(
                                "dense",
                                self._activations[k, at : at + n],
                                self._signals[k, at : at + n] * scales[k],
                                has_bias=True,
                            ),
                        ),
                    )
                    for k, name in enumerate(CHECKPOINTS)
                ),
            )


def read(work: Path, rows: int) -> dict[str, float]:
    """Reads all factors of a synthetic store, as blocks of float32."""
    start = time.perf_counter()
    store = FactorStore.open(synthetic(work, rows))
    for shard in store.description.shards:
        blocks([store.shard(shard.name)])
    return {"seconds": time.perf_counter() - start}


JOBS = {"nothing": nothing, "write": write, "read": read}

if __name__ == "__main__":
    main()
