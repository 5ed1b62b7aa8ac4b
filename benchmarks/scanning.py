"""Stores to ask, scans of them in the benchmark's own process, and bare limits of what these do."""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from imagenet_fit import fitted
from imagenet_shape import ImageNetShape
from imagenet_store import QUERIES as IMAGENET_QUERIES
from imagenet_store import QUERY_SEED, write_store
from measure import Measured, spec, tracin, train_mnist
from mnist import QUERIES, K, network
from store import extract
from threadpoolctl import threadpool_limits

from tracin_transforms.core.factors import FactorBlock, concatenate_blocks
from tracin_transforms.core.likely_pairs import LikelyPairs
from tracin_transforms.core.pruning import Pruner
from tracin_transforms.core.queries import Queries
from tracin_transforms.core.ranking import TopInfluences
from tracin_transforms.core.threads import Threads
from tracin_transforms.core.top_scan import TopScan
from tracin_transforms.storage.factor_shard import PackedBlock, StoredShard
from tracin_transforms.storage.factor_store import FactorStore
from tracin_transforms.storage.shard_scan import scan_shard, scout_shard

THREADS = len(os.sched_getaffinity(0))
BLOCK_ROWS = 2048


@dataclass(frozen=True)
class Bench:
    """Where things are, and how much is measured.

    Attributes:
        data: Has mnist.npz, efficientnet_lite0.keras and imagenet_sample/.
        work: Has run, train.npz, queries.npz, store and query-store of MNIST, and imagenet/.
        rows: Of the ImageNet-shaped store.
        rounds: How often each thing is measured.
        threads: Of scans in this process.
    """

    data: Path
    work: Path
    rows: int
    rounds: int
    threads: Threads

    @property
    def scratch(self) -> Path:
        """For what is removed at the end."""
        return self.work / "scratch"

    @property
    def mnist_examples(self) -> list[str]:
        """Options of commands that compute the gradient factors of MNIST."""
        return [
            "--checkpoints",
            str(self.work / "run"),
            "--examples",
            spec(self.work / "train.npz"),
        ]

    def mnist(self) -> tuple[Path, Path]:
        """Returns the stores of MNIST's training and query examples; made unless they are there."""
        train_mnist(self.data / "mnist.npz", self.work, QUERIES, network)
        examples, queries = self.work / "store", self.work / "query-store"
        if not is_finished(examples):
            extract(examples, self.mnist_examples)
        if not is_finished(queries):
            files = ["--examples", spec(self.work / "queries.npz")]
            extract(queries, [*self.mnist_examples[:2], *files, "--dtype", "float32"])
        return examples, queries

    def imagenet(self, rows: int) -> Path:
        """Returns a store of so many ImageNet-shaped rows, or a few more: whole shards.

        The first time, it writes `self.rows` of them, which are kept; fewer are links to these.
        """
        train = self.work / "imagenet" / "train"
        if not train.exists():
            write_store(train, self._shape, self.rows)
        store = FactorStore.open(train)
        store.check_finished()
        shards = store.description.shards
        ends = np.cumsum([shard.count for shard in shards])
        if ends[-1] < rows:
            raise SystemExit(f"{train} has {ends[-1]:,} rows: remove it, or ask for fewer --rows")
        some = shards[: int(np.searchsorted(ends, rows)) + 1]
        return train if len(some) == len(shards) else self._linked(store, some)

    def imagenet_queries(self, count: int = IMAGENET_QUERIES) -> Path:
        """Returns a store of so many ImageNet-shaped queries; made unless it is there."""
        usual = self.work / "imagenet" / "queries"
        path = usual if count == IMAGENET_QUERIES else self.scratch / f"queries-{count}"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            write_store(path, self._shape, count, seed=QUERY_SEED, prefix="val")
        return path

    @property
    def _shape(self) -> ImageNetShape:
        directory = self.work / "imagenet"
        directory.mkdir(exist_ok=True)
        return fitted(self.data, directory)

    def _linked(self, store: FactorStore, shards: Sequence[Any]) -> Path:
        directory = self.scratch / f"imagenet-{sum(shard.count for shard in shards)}"
        if is_finished(directory):
            return directory
        shutil.rmtree(directory, ignore_errors=True)
        description = replace(store.description, shards=tuple(shards))
        linked = FactorStore.prepare(directory, description)
        for shard in shards:
            there, here = store.paths(shard.name), linked.paths(shard.name)
            for file in ("factors", "sidecar"):
                getattr(here, file).symlink_to(getattr(there, file).resolve())
        linked.finish()
        return directory


def is_finished(directory: Path) -> bool:
    """Returns whether a directory holds a store that is finished."""
    return (directory / "store.json").is_file() and FactorStore.open(directory).is_finished()


def queries_of(directory: Path) -> FactorBlock:
    """Returns the examples of a store in the order of their source, to be asked as queries."""
    store = FactorStore.open(directory)
    parts = []
    for shard in store.description.shards:
        block = concatenate_blocks(
            list(store.shard(shard.name).blocks(store.description.checkpoint_ids))
        )
        parts.append(block.rows(np.argsort(block.indices)))
    return concatenate_blocks(parts)


@dataclass(frozen=True, eq=False)
class Asked:
    """A store and what is asked of it.

    Attributes:
        store: The store.
        queries: The queries, with factors like those of the store.
        threads: What the work is shared among.
        k: Proponents, and opponents, of each query.
        held: The store's shards, where they are in memory.
    """

    store: FactorStore
    queries: Queries
    threads: Threads
    k: int = K
    held: tuple[StoredShard, ...] = ()

    @classmethod
    def of(cls, directory: Path, block: FactorBlock, threads: Threads) -> "Asked":
        """Returns queries, with their gradient factors themselves, and the store in a directory."""
        store = FactorStore.open(directory)
        sketch = store.description.sketch
        weights = np.array(list(store.description.sorting_weights.values()))
        stored = block if sketch is None else sketch.project(block)
        return cls(store, Queries.prepare(stored, weights), threads)

    def first(self, count: int) -> "Asked":
        """Returns the same of the first queries."""
        some = self.queries.block.rows(slice(0, count))
        return replace(self, queries=Queries.prepare(some, self.queries.weights))

    def in_memory(self) -> "Asked":
        """Returns the same with all factors in memory, as they are stored."""
        ids = self.checkpoint_ids
        return replace(self, held=tuple(HeldShard.of(shard, ids) for shard in self.shards()))

    @property
    def checkpoint_ids(self) -> tuple[str, ...]:
        """All of the store's."""
        return self.store.description.checkpoint_ids

    @property
    def rows(self) -> int:
        """How many the store has."""
        return sum(shard.count for shard in self.store.description.shards)

    def flop(self, rows: int) -> float:
        """Returns the operations of the products of so many rows with all queries."""
        numbers = sum(right.shape[0] for right in self._right_operands())
        return 2.0 * rows * len(self.queries) * numbers

    def shards(self, with_peaks: bool = False) -> list[StoredShard]:
        """Returns the shards, their sidecars read now, unless they are in memory."""
        names = [shard.name for shard in self.store.description.shards]
        return [*self.held] or [self.store.shard(name, with_peaks) for name in names]

    def brute(self) -> TopInfluences:
        """Multiplies all pairs."""
        scan = TopScan(self.queries, self.k, self.threads)
        for shard in self.shards():
            scan_shard(shard, self.checkpoint_ids, scan)
        return scan.top()

    def pruned(self) -> TopInfluences:
        """Multiplies what a few pairs do not rule out, as `ScoreStoredInfluence`."""
        some = TopScan(self.queries, self.k, self.threads)
        shards = len(self.store.description.shards)
        likely = LikelyPairs(self.queries, self.k, shards, self.threads)
        for shard in self.shards(with_peaks=True):
            scout_shard(shard, self.checkpoint_ids, some, likely)
        scouted = some.top()
        scan = TopScan(self.queries, self.k, self.threads, scouted.thresholds())
        pruner = Pruner(self.queries, scan.tile_rows, self.threads)
        for shard in self.shards(with_peaks=True):
            scan_shard(shard, self.checkpoint_ids, scan, pruner)
        return scouted.merge(scan.top())

    def unpack(self) -> None:
        """Makes float32 of all rows in memory, in pieces like those of a scan, and no more."""
        most = TopScan(self.queries, self.k, self.threads).tile_rows

        def unpack_piece(piece: tuple[PackedBlock, slice]) -> None:
            block, rows = piece
            for _ in block.gradients_of(rows):
                pass

        for shard in self.held:
            for _, block in shard.packed_blocks(self.checkpoint_ids):
                step = min(most, -(-len(block) // self.threads.count))
                starts = range(0, len(block), step)
                pieces = [(block, slice(at, min(at + step, len(block)))) for at in starts]
                self.threads.map(unpack_piece, pieces)

    def sgemm(self, rows: int) -> Callable[[], None]:
        """Returns what multiplies so many rows with all queries by BLAS alone.

        All products of a factor have the same block of float32 rows on their left.
        """
        rng = np.random.default_rng(0)
        rights = self._right_operands()
        lefts = {n: rng.random((BLOCK_ROWS, n), np.float32) for n in {len(b) for b in rights}}
        found = np.empty((BLOCK_ROWS, len(self.queries)), np.float32)

        def multiply() -> None:
            with threadpool_limits(THREADS, "blas"):
                for start in range(0, rows, BLOCK_ROWS):
                    n = min(BLOCK_ROWS, rows - start)
                    for right in rights:
                        np.matmul(lefts[len(right)][:n], right, out=found[:n])

        return multiply

    def _right_operands(self) -> list[np.ndarray]:
        gradients = self.queries.scored.gradients
        layers = [layer for gradient in gradients for layer in gradient.layers]
        return [x.T for layer in layers for x in (layer.activations, layer.error_signals)]


@dataclass(frozen=True, eq=False)
class HeldShard(StoredShard):
    """A shard in memory.

    Attributes:
        blocks_held: All of its blocks.
    """

    blocks_held: tuple[PackedBlock, ...]

    @classmethod
    def of(cls, shard: StoredShard, checkpoint_ids: Sequence[str]) -> "HeldShard":
        """Reads a shard."""
        blocks = tuple(block for _, block in shard.packed_blocks(checkpoint_ids))
        return cls(shard.paths, shard.sidecar, blocks)

    def packed_blocks(
        self,
        checkpoint_ids: Sequence[str],
        wanted: Callable[[int], np.ndarray | None] = lambda _: None,
    ) -> Iterator[tuple[int, PackedBlock]]:
        """Yields the blocks."""
        for i, block in enumerate(self.blocks_held):
            if (rows := wanted(i)) is None or len(rows):
                yield i, block


def in_turn(
    rounds: int,
    jobs: dict[str, Callable[[], Any]],
    before: Callable[[], object] = lambda: None,
) -> tuple[dict[str, np.ndarray], dict[str, list[Any]]]:
    """Runs jobs one after the other, several times.

    Args:
        rounds: How often.
        jobs: By name.
        before: Runs before each, and is not timed.

    Returns:
        Seconds of each job, shape [rounds], and what it returned each time.
    """
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    found: dict[str, list[Any]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            before()
            start = time.perf_counter()
            found[name].append(job())
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(times) for name, times in seconds.items()}, found


def influence(output: Path, store: Path, queries: Path, *more: str) -> tuple[Measured, float]:
    """Runs `tracin influence` of a store with stored queries; returns what `tracin` does."""
    stores = ["--store", str(store), "--queries", f"store:{queries}"]
    return tracin("influence", output, *stores, "--k", str(K), *more)
