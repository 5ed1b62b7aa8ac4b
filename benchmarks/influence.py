"""Scoring from a store: scans beside bare products and reads, pruning, whole commands, sketches.

    .venv/bin/python benchmarks/influence.py DATA WORK [--parts kernel pruning ...] [--rows N]

DATA holds mnist.npz, efficientnet_lite0.keras and imagenet_sample/, see benchmarks/mnist.py,
efficientnet.py and imagenet_fit.py. WORK may be that of benchmarks/mnist.py or store.py, whose
network and store are taken; WORK/imagenet may be that of imagenet_store.py, or a link to it. What
is missing is made: an ImageNet-shaped store of N rows takes 18.3 KB of disk for each (3.7 GB, or
23 GB for all 1,281,167), and is kept. WORK/scratch, with up to 3 GB more, is removed at the end.

    kernel    TopScan over rows in memory beside BLAS alone; over files that are not in memory
    pruning   pruned scans beside those of all pairs: the same result, and how much faster
    full      `tracin influence` with 1,000 queries over N rows, beside bare products and reads;
              pruned scans with few queries, of files that are not in memory
    beam      the pipelines beside the same scans in this process, 1 and 2 worker processes
    sketches  size, speed and recall of sketches, and of shortlists that are scored again

All parts but `full` take 200,160 rows, if there are more. Ratios are medians of three rounds, in
which what is compared is measured in turn. Goals of `full` are for all rows of ImageNet.
"""

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import psutil
from efficientnet import prepare
from imagenet_shape import Rows
from imagenet_store import IMAGENET, blocks, write_store
from measure import bare, beam_options, drop, line, parser, spec, tracin, warm
from scanning import THREADS, Asked, Bench, in_turn, influence, is_finished, queries_of
from sketches import report_sketches
from store import extract, null_job
from threadpoolctl import threadpool_info

from tracin_transforms.core.protocols import Shard
from tracin_transforms.core.ranking import TopInfluences
from tracin_transforms.core.threads import Threads
from tracin_transforms.storage.results import read_result

# 20 shards of 10,008 rows.
PART_ROWS, FEW_ROWS = 200_160, 100_080
# Rows whose products take some seconds.
BLAS_ROWS = 20_016
BEAM_QUERIES = 200
EVEN_ROWS, EVEN_QUERIES = 40_000, 100
# By number of queries, the least share of BLAS's speed: in memory, and from disk.
IN_MEMORY, FROM_DISK = {1000: 0.90, 200: 0.75, 20: 0.50}, {1000: 0.85, 200: 0.65}
# By number of queries, how many times as fast pruned scans are.
FEW_QUERIES = {1: 3.0, 20: 3.0, 100: 3.0}

# Options of `tracin influence`.
KINDS = {"brute force": ["--no-prune"], "pruned": []}


def main() -> None:
    """Runs the parts that are asked for."""
    found = parser(__doc__, "data", "work")
    found.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    found.add_argument("--rows", type=int, default=PART_ROWS, help="ImageNet-shaped rows")
    found.add_argument("--rounds", type=int, default=3, help="how often each thing is measured")
    found.add_argument("--keep", action="store_true", help="leave WORK/scratch as it is")
    options = found.parse_args()
    bench = Bench(options.data, options.work, options.rows, options.rounds, Threads(THREADS))
    bench.scratch.mkdir(parents=True, exist_ok=True)
    try:
        report_machine(bench)
        for part in options.parts:
            print(f"\n{part}", flush=True)
            PARTS[part](bench)
    finally:
        if not options.keep:
            shutil.rmtree(bench.scratch)


def report_machine(bench: Bench) -> None:
    """Says what all ratios depend on."""
    asked = _imagenet(bench)
    libraries = [info for info in threadpool_info() if info["user_api"] == "blas"]
    own = [info for info in libraries if "numpy" in info["filepath"]] or libraries
    print(
        f"{os.cpu_count()} cores, OPENBLAS_CORETYPE={os.environ.get('OPENBLAS_CORETYPE')}, load "
        f"{os.getloadavg()[0]:.1f}, {psutil.virtual_memory().total / 1e9:.0f} GB of memory"
    )
    for info in own:
        print(
            f"BLAS of numpy: {info['internal_api']} {info['version']}, "
            f"{info.get('architecture')}, {info['num_threads']} thread(s) in each of {THREADS}"
        )
    rows = min(asked.rows, BLAS_ROWS)
    seconds, _ = in_turn(bench.rounds, {"sgemm": asked.sgemm(rows)})
    rate = asked.flop(rows) / np.median(seconds["sgemm"]) / 1e9
    line(
        f"bare sgemm with {len(asked.queries):,} queries, {THREADS} threads, GFLOP/s", rate, ",.0f"
    )
    shards = asked.shards()
    size = sum(shard.sidecar.file.size for shard in shards)
    for state, before in (("warm", warm), ("cold", drop)):
        seconds, _ = in_turn(bench.rounds, {"read": partial(bare, shards)}, partial(before, shards))
        line(f"bare reading, {state}, GB/s", size / np.median(seconds["read"]) / 1e9, ".2f")


def _imagenet(bench: Bench, queries: int | None = None) -> Asked:
    """Returns the ImageNet-shaped store of at most `PART_ROWS` rows, and queries."""
    directory = bench.imagenet(min(bench.rows, PART_ROWS))
    block = queries_of(bench.imagenet_queries(*([] if queries is None else [queries])))
    return Asked.of(directory, block, bench.threads)


# Kernel


def report_kernel(bench: Bench) -> None:
    """Compares scans with bare products and reads of the same size."""
    asked = _imagenet(bench)
    _report_in_memory(bench, asked.in_memory())
    _report_from_disk(bench, asked)


def _report_in_memory(bench: Bench, every: Asked) -> None:
    for count, goal in IN_MEMORY.items():
        asked = every.first(count)
        jobs = {"scan": asked.brute, "sgemm": asked.sgemm(asked.rows)}
        if count == max(IN_MEMORY):
            jobs["unpack"] = asked.unpack
        seconds, _ = in_turn(bench.rounds, jobs)
        name = f"in memory, {count:,} queries: "
        _rates(name, asked, seconds)
        ratio = np.median(seconds["sgemm"] / seconds["scan"])
        line(f"{name}scan, speed of bare sgemm", ratio, ".2f", least=goal)
        if "unpack" in seconds:
            share = np.median(seconds["unpack"] / seconds["scan"])
            line(f"{name}share of float16 to float32", share, ".4f", most=0.02)


def _report_from_disk(bench: Bench, every: Asked) -> None:
    shards = every.shards()
    for count, goal in FROM_DISK.items():
        asked = every.first(count)
        jobs = {
            "scan": asked.brute,
            "sgemm": asked.sgemm(asked.rows),
            "reading": partial(bare, shards),
        }
        seconds, _ = in_turn(bench.rounds, jobs, partial(drop, shards))
        name = f"cold files, {count:,} queries: "
        _rates(name, asked, seconds)
        slower = np.maximum(seconds["sgemm"], seconds["reading"])
        ratio = np.median(slower / seconds["scan"])
        line(f"{name}scan, speed of the slower of both", ratio, ".2f", least=goal)


def _rates(name: str, asked: Asked, seconds: dict[str, np.ndarray]) -> None:
    for job, took in seconds.items():
        line(f"{name}{job}, s for {asked.rows:,} rows", np.median(took), ",.2f")
    for job in ("scan", "sgemm"):
        rate = asked.flop(asked.rows) / np.median(seconds[job]) / 1e9
        line(f"{name}{job}, GFLOP/s", rate, ",.0f")


# Pruning


def report_pruning(bench: Bench) -> None:
    """Compares pruned scans with those of all pairs, of warm files."""
    store, queries = bench.mnist()
    mnist = Asked.of(store, queries_of(queries), bench.threads)
    for count, goal in {1: 3.0, 20: 3.0, 200: 4.0}.items():
        _report_pruned("MNIST", mnist.first(count), bench.rounds, goal)
    photographs = _photographs(bench)
    asked = Asked.of(photographs, queries_of(photographs), bench.threads)
    for count in (100, 1000):
        _report_pruned("photographs", asked.first(count), bench.rounds)
    _report_pruned("ImageNet-shaped", _imagenet(bench).first(100), bench.rounds, 3.0)
    _report_pruned("even rows", _even(bench), bench.rounds, 1 / 1.1)


def _report_pruned(
    name: str,
    asked: Asked,
    rounds: int,
    goal: float = 0.0,
    before: Callable[[], object] = lambda: None,
) -> None:
    warm(asked.shards())
    jobs = {"brute force": asked.brute, "pruned": asked.pruned}
    seconds, found = in_turn(rounds, jobs, before)
    name = f"{name}, {asked.rows:,} rows, {len(asked.queries):,} queries: "
    for job, took in seconds.items():
        line(f"{name}{job}, s", np.median(took), ",.3f")
    ratio = np.median(seconds["brute force"] / seconds["pruned"])
    line(f"{name}brute force / pruned", ratio, ".2f", least=goal)
    share = found["pruned"][0].pairs / (asked.rows * len(asked.queries))
    line(f"{name}share of pairs multiplied", share, ".4f")
    same = sum(map(_is_same, found["brute force"], found["pruned"])) / rounds
    line(f"{name}rounds of the same result, bit by bit", same, ".2f", least=1)


def _is_same(one: TopInfluences, other: TopInfluences) -> bool:
    names = ("query_rows", "example_ids", "labels", "predictions", "parts")
    ends = ((one.proponents, other.proponents), (one.opponents, other.opponents))
    return all(
        np.array_equal(getattr(a, name), getattr(b, name)) for a, b in ends for name in names
    )


def _photographs(bench: Bench) -> Path:
    """Returns the store of the photographs at three checkpoints."""
    work = bench.work / "efficientnet"
    prepare(bench.data / "efficientnet_lite0.keras", bench.data / "imagenet_sample", work)
    if not is_finished(work / "store"):
        examples = ["--examples", spec(work / "train.npz")]
        extract(work / "store", ["--checkpoints", str(work / "run"), *examples])
    return work / "store"


class EvenRows:
    """Rows of which none can be left out: all norms are 1, and no error signal has peaks."""

    def rows(self, n: int, seed: tuple[int, ...], first: int = 0) -> Rows:
        """Returns rows with random directions."""
        rng = np.random.default_rng([*seed, first])
        rows = Rows.empty(n, 3)
        for array in (*rows.activations, *rows.error_signals):
            rng.standard_normal(array.shape, np.float32, out=array)
            array /= np.linalg.norm(array, axis=1, keepdims=True)
        for array in (rows.labels, rows.predictions, rows.losses):
            array[...] = 0
        return rows


def _even(bench: Bench) -> Asked:
    """Returns even rows and queries, as many as there are ImageNet-shaped ones at most."""
    count = min(EVEN_ROWS, bench.rows)
    write_store(bench.scratch / "even", EvenRows(), count, processes=1)
    shard = Shard("queries", count=EVEN_QUERIES, size=EVEN_QUERIES)
    block = next(blocks(EvenRows(), shard, 0, seed=1))
    return Asked.of(bench.scratch / "even", block, bench.threads)


# Whole commands


def report_full(bench: Bench) -> None:
    """Compares the commands with bare products and reads; says how memory grows with rows."""
    train, queries = bench.imagenet(bench.rows), bench.imagenet_queries()
    asked = Asked.of(train, queries_of(queries), bench.threads)
    shards, sample = asked.shards(), min(asked.rows, BLAS_ROWS)
    outputs = {kind: bench.scratch / kind.split()[0] for kind in KINDS}
    jobs = {
        **{
            kind: partial(influence, outputs[kind], train, queries, *more)
            for kind, more in KINDS.items()
        },
        "reading": partial(bare, shards),
        "sgemm": asked.sgemm(sample),
    }
    seconds, found = in_turn(bench.rounds, jobs, partial(drop, shards))
    seconds["sgemm"] *= asked.rows / sample
    for job in ("reading", "sgemm"):
        _seconds(f"bare {job}", seconds[job], asked.rows)
    _report_command("command", seconds, seconds, asked.rows)
    pipelines = {kind: np.array([pipeline for _, pipeline in found[kind]]) for kind in KINDS}
    _report_command("pipeline", pipelines, seconds, asked.rows)
    summary = json.loads((outputs["pruned"] / "manifest.json").read_text())["summary"]
    line("share of pairs multiplied", summary["scored_share"], ".4f")
    one, other = (read_result(output, "influence") for output in outputs.values())
    line("the same result, bit by bit", float(one.equals(other)), ".0f", least=1)
    peaks = {kind: float(np.median([m.peak for m, _ in found[kind]])) for kind in KINDS}
    _report_memory(bench, asked, queries, peaks)
    _report_ranking(bench, train, asked.rows)
    for count, goal in FEW_QUERIES.items():
        few = asked.first(count)
        _report_pruned("cold files", few, bench.rounds, goal, partial(drop, shards))


def _report_command(
    name: str, took: dict[str, np.ndarray], bare_seconds: dict[str, np.ndarray], rows: int
) -> None:
    reading = bare_seconds["reading"]
    brute, pruned = (took[kind] for kind in KINDS)
    for kind in KINDS:
        _seconds(f"{kind}, {name}, {rows:,} rows", took[kind], rows)
    ratio = np.median(brute / np.maximum(bare_seconds["sgemm"], reading))
    line(f"{name}: brute force / the slower of sgemm and reading", ratio, ".2f", most=1.2)
    ratio = np.median(pruned / (0.4 * brute + reading))
    line(f"{name}: pruned / (0.4 brute force + reading)", ratio, ".2f", most=1)
    line(f"{name}: brute force / pruned", np.median(brute / pruned), ".2f")


def _seconds(name: str, took: np.ndarray, rows: int) -> None:
    line(f"{name}, s", np.median(took), ",.1f")
    if rows < IMAGENET:
        line(f"  {IMAGENET:,} rows, in proportion", np.median(took) * IMAGENET / rows, ",.0f")


def _report_memory(bench: Bench, asked: Asked, queries: Path, peaks: dict[str, float]) -> None:
    """Compares the peak memory of the commands with that for fewer rows."""
    few = bench.imagenet(min(FEW_ROWS, asked.rows // 2))
    rows = Asked.of(few, asked.queries.block, bench.threads).rows
    for job, more in KINDS.items():
        measured, _ = influence(bench.scratch / "few", few, queries, *more)
        line(f"{job}, {rows:,} rows: peak memory, MB", measured.peak / 1e6, ",.0f")
        line(f"{job}, {asked.rows:,} rows: peak memory, MB", peaks[job] / 1e6, ",.0f")
        difference = (peaks[job] - measured.peak) / 1e6
        line(f"{job}: MB for {asked.rows / rows:.1f} times the rows", difference, "+,.0f")


def _report_ranking(bench: Bench, train: Path, rows: int) -> None:
    job = partial(tracin, "self-influence", bench.scratch / "ranking", "--store", str(train))
    seconds, found = in_turn(bench.rounds, {"ranking": job})
    pipelines = np.array([pipeline for _, pipeline in found["ranking"]])
    _seconds(f"self-influence, {rows:,} rows, command", seconds["ranking"], rows)
    _seconds(f"self-influence, {rows:,} rows, pipeline", pipelines, rows)
    peak = max(measured.peak for measured, _ in found["ranking"])
    line(f"self-influence, {rows:,} rows: peak memory, MB", peak / 1e6, ",.0f")


# Beam


def report_beam(bench: Bench) -> None:
    """Compares pipelines, less those without work, with scans of the same files here."""
    asked = _imagenet(bench, BEAM_QUERIES)
    queries = bench.imagenet_queries(BEAM_QUERIES)
    store = Path(asked.store.directory)
    jobs = {"brute force": asked.brute, "pruned": asked.pruned}
    for processes in (1, 2):
        jobs[f"nothing {processes}"] = partial(null_job, bench.work, processes)
        for kind, more in KINDS.items():
            options = [*more, *beam_options(processes)]
            output = bench.scratch / "beam"
            jobs[f"{kind} {processes}"] = partial(influence, output, store, queries, *options)
    shards = asked.shards()
    seconds, found = in_turn(bench.rounds, jobs, partial(warm, shards))
    name = f"{asked.rows:,} rows, {BEAM_QUERIES} queries: "
    for kind in KINDS:
        line(f"{name}{kind}, here, s", np.median(seconds[kind]), ",.2f")
    for processes in (1, 2):
        whole, nothing = (
            {kind: np.array([took for _, took in found[f"{kind} {processes}"]]) for kind in some}
            for some in (KINDS, ("nothing",))
        )
        what = f"{name}{processes} process(es), "
        line(f"{what}nothing, pipeline, s", np.median(nothing["nothing"]), ",.2f")
        for kind in KINDS:
            beyond = whole[kind] - nothing["nothing"]
            line(f"{what}{kind}, pipeline, s", np.median(whole[kind]), ",.2f")
            ratio = np.median(beyond / seconds[kind])
            line(f"{what}{kind}, beyond / here", ratio, ".2f", most=1.1)


PARTS = {
    "kernel": report_kernel,
    "pruning": report_pruning,
    "full": report_full,
    "beam": report_beam,
    "sketches": report_sketches,
}

if __name__ == "__main__":
    main()
