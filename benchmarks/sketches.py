"""Part of benchmarks/influence.py: what sketches cost, and what they find."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from measure import line, size_of
from mnist import K
from scanning import THREADS, Asked, Bench, in_turn, influence, queries_of
from store import extract
from threadpoolctl import threadpool_limits

from tracin_transforms.core.ranking import TopInfluences
from tracin_transforms.core.sketching import Sketch
from tracin_transforms.storage.factor_store import FactorStore
from tracin_transforms.storage.results import read_result
from tracin_transforms.storage.shard_writer import ShardWriter

# With the least share of the strongest pairs that --rescore is to find.
MNIST_SKETCHES = {"100": 0.98, "20": 0.98}
# Three quarters of 1,472 numbers hold the error signals of 1,000 classes whole: two-sided, it is as
# the first, but has no peaks to prune by. The third projects both sides.
IMAGENET_SKETCHES = {"1472": 0.98, "two-sided:1472": 0.98, "two-sided:736": 0.0}
ROWS, QUERIES = 200_160, 200
# What --rescore looks at again, unless --shortlist says otherwise.
SHORTLIST = 10 * K

Ends = dict[tuple[str, str], list[str]]


def report_sketches(bench: Bench) -> None:
    """Compares stores of sketches with those of the gradient factors themselves."""
    for name, exact, queries, goals in _cases(bench):
        asked = Asked.of(exact, queries_of(queries), bench.threads)
        for text, goal in goals.items():
            directory = bench.scratch / "sketch"
            _write(bench, name, exact, directory, text)
            _report_cost(bench, f"{name}, {text}: ", asked, directory)
            _report_recall(bench, f"{name}, {text}: ", asked, directory, queries, goal)
            shutil.rmtree(directory)


def _cases(bench: Bench) -> Iterator[tuple[str, Path, Path, dict[str, float]]]:
    yield "MNIST", *bench.mnist(), MNIST_SKETCHES
    queries = bench.imagenet_queries(QUERIES)
    yield "ImageNet-shaped", bench.imagenet(min(bench.rows, ROWS)), queries, IMAGENET_SKETCHES


def _write(bench: Bench, name: str, exact: Path, directory: Path, text: str) -> None:
    if name == "MNIST":
        extract(directory, [*bench.mnist_examples, "--sketch", text])
    else:
        with threadpool_limits(THREADS, "blas"):
            write_sketches(exact, directory, Sketch.parse(text))


def write_sketches(exact: Path, directory: Path, sketch: Sketch) -> None:
    """Writes a store of sketches of the factors in another store."""
    store = FactorStore.open(exact)
    described = store.description
    factors = {**described.factors, "sketch": sketch.to_json()}
    sketches = FactorStore.prepare(directory, replace(described, factors=factors))
    weights = described.sorting_weights
    for shard in described.shards:
        paths = sketches.paths(shard.name)
        with ShardWriter(paths, shard, weights, "float16", sketch=sketch) as writer:
            for block in store.shard(shard.name).blocks(described.checkpoint_ids):
                writer.add(block)
            writer.finish([])
    sketches.finish()


def _report_cost(bench: Bench, name: str, exact: Asked, directory: Path) -> None:
    """Compares size and scans of a store of sketches with those of the exact one."""
    asked = Asked.of(directory, exact.queries.block, bench.threads)
    jobs = {
        "all pairs, exact": exact.brute,
        "all pairs, sketches": asked.brute,
        "pruned, exact": exact.pruned,
        "pruned, sketches": asked.pruned,
    }
    seconds, _ = in_turn(bench.rounds, jobs)
    count, size = exact.rows, size_of(directory)
    line(f"{name}bytes of each of {count:,} rows", size / count, ",.0f")
    line(f"{name}bytes / exact", size / size_of(Path(exact.store.directory)), ".3f")
    for job, took in seconds.items():
        line(f"{name}{job}, {len(exact.queries)} queries, s", np.median(took), ",.3f")
    for kind in ("all pairs", "pruned"):
        ratio = np.median(seconds[f"{kind}, sketches"] / seconds[f"{kind}, exact"])
        line(f"{name}{kind}, seconds / exact", ratio, ".3f")


def _report_recall(
    bench: Bench, name: str, exact: Asked, directory: Path, queries: Path, goal: float
) -> None:
    """Says which share of the strongest pairs are found with sketches, alone and scored again."""
    asked = Asked.of(directory, exact.queries.block, bench.threads)
    true = _ends(exact.pruned())
    line(f"{name}overlap of the first {K}", recall(true, _ends(asked.pruned())), ".4f")
    among = recall(true, _ends(replace(asked, k=SHORTLIST).pruned()))
    line(f"{name}true first {K} among the first {SHORTLIST}", among, ".4f")
    output = bench.scratch / "rescored"
    influence(output, directory, queries, "--rescore", str(exact.store.directory))
    summary = json.loads((output / "manifest.json").read_text())["summary"]
    line(f"{name}--rescore, first stage, s", summary["seconds"], ",.1f")
    line(f"{name}--rescore, second stage, s", summary["rescoring_seconds"], ",.1f")
    found = recall(true, _ends_of_result(output))
    line(f"{name}true first {K} found with --rescore", found, ".4f", least=goal)


def recall(true: Ends, found: Ends) -> float:
    """Returns which share of the true ends is among those that were found."""
    shares = [len({*ids} & {*found.get(key, ())}) / len(ids) for key, ids in true.items()]
    return float(np.mean(shares))


def _ends(top: TopInfluences) -> Ends:
    """Returns the ids of each query's proponents and opponents."""
    found: Ends = {}
    for direction, rows in (("proponent", top.proponents), ("opponent", top.opponents)):
        for query, example_id in zip(rows.query_rows, rows.example_ids, strict=True):
            found.setdefault((str(top.query_ids[query]), direction), []).append(str(example_id))
    return found


def _ends_of_result(directory: Path) -> Ends:
    found: Ends = {}
    columns = ["query_id", "direction", "example_id"]
    for row in read_result(directory, "influence", columns).to_pylist():
        key = row["query_id"], row["direction"]
        found.setdefault(key, []).append(row["example_id"])
    return found


if __name__ == "__main__":
    raise SystemExit("run benchmarks/influence.py --parts sketches")
