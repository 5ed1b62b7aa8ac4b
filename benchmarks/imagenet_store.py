"""Factor stores of ImageNet's shape: training examples and queries.

    .venv/bin/python benchmarks/imagenet_store.py DATA_DIR WORK_DIR [--rows N]

DATA_DIR is that of imagenet_fit.py, whose generator is fitted unless it is in WORK_DIR. A store of
N training examples and one of query examples are written to WORK_DIR/train and WORK_DIR/queries:

    tracin influence --store WORK_DIR/train --queries store:WORK_DIR/queries --k 20 --output RESULT
"""

import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
from imagenet_fit import fitted
from imagenet_shape import CHECKPOINTS, PIECE, ImageNetShape, Rows
from measure import parser

from tracin_transforms.core.factors import FactorBlock, GradientFactors, LayerFactors
from tracin_transforms.core.protocols import Shard
from tracin_transforms.storage.factor_store import FactorStore
from tracin_transforms.storage.shard_writer import ShardWriter
from tracin_transforms.storage.store_description import StoreDescription

RATES = (0.1, 0.1, 0.01)
IMAGENET, QUERIES = 1_281_167, 1_000
# 128 shards; with 1,251 rows there are 1,025, as the 1,024 files of ImageNet and a short one.
SHARD_ROWS = 10_008
BLOCK_ROWS = 4 * PIECE
QUERY_SEED = 1


class Maker(Protocol):
    """Makes rows, the same for the same seed and piece."""

    def rows(self, n: int, seed: tuple[int, ...], first: int = 0) -> Rows:
        """Returns n rows, of which the first one begins a piece of that number."""
        ...


def main() -> None:
    """Writes two stores."""
    found = parser(__doc__, "data", "work")
    found.add_argument("--rows", type=int, default=IMAGENET, help="training examples")
    found.add_argument("--shard-rows", type=int, default=SHARD_ROWS, help="rows of each shard")
    options = found.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    shape = fitted(options.data, options.work)
    write_store(options.work / "queries", shape, QUERIES, seed=QUERY_SEED, prefix="val")
    seconds = write_store(options.work / "train", shape, options.rows, options.shard_rows)
    print(f"{options.rows:,} rows in {seconds:.1f} s: {options.rows / seconds:,.0f} rows/s")


def blocks(maker: Maker, shard: Shard, index: int, seed: int = 0) -> Iterator[FactorBlock]:
    """Yields the blocks of a shard, which depend on nothing but its index, size and the seed.

    Args:
        maker: Makes the rows.
        shard: Its name becomes part of the ids.
        index: Its number.
        seed: Another one gives other examples.
    """
    for start in range(0, shard.count, BLOCK_ROWS):
        n = min(BLOCK_ROWS, shard.count - start)
        yield _block(shard.name, start, maker.rows(n, (seed, index), first=start // PIECE))


def _block(name: str, start: int, rows: Rows) -> FactorBlock:
    """Returns rows as a block of a shard that begins at the row `start` of it."""
    indices = np.arange(start, start + len(rows.labels))
    gradients = zip(CHECKPOINTS, rows.activations, rows.error_signals, strict=True)
    return FactorBlock(
        shard=name,
        indices=indices,
        example_ids=np.array([f"{name}:{i:06d}" for i in indices]),
        labels=rows.labels,
        predictions=rows.predictions,
        losses=rows.losses,
        gradients=tuple(
            GradientFactors(checkpoint, (LayerFactors("logits", h, e, has_bias=True),))
            for checkpoint, h, e in gradients
        ),
    )


def write_store(
    directory: Path,
    maker: Maker,
    rows: int,
    shard_rows: int = SHARD_ROWS,
    *,
    seed: int = 0,
    prefix: str = "train",
    dtype: str = "float16",
    processes: int | None = None,
) -> float:
    """Writes a factor store, in place of what is there; returns the seconds.

    Args:
        directory: Where.
        maker: Makes the rows; in several processes, an `ImageNetShape`.
        rows: How many, exactly; the last shard may be shorter.
        shard_rows: Rows of each shard.
        seed: Of the examples.
        prefix: Of the shards' names, which become part of ids.
        dtype: ``float16`` or ``float32``.
        processes: How many shards are written at a time; None: one for each core.
    """
    start = time.perf_counter()
    shutil.rmtree(directory, ignore_errors=True)
    counts = [min(shard_rows, rows - i) for i in range(0, rows, shard_rows)]
    shards = tuple(Shard(f"{prefix}-{i:05d}", count=n, size=n) for i, n in enumerate(counts))
    store = FactorStore.prepare(directory, _description(shards))
    processes = min(processes or os.cpu_count() or 1, len(shards))
    if processes == 1:
        for i in range(len(shards)):
            _write_shard(store, maker, i, seed, dtype)
    else:
        work = directory.parent / f".{directory.name}-{os.getpid()}"
        work.mkdir()
        assert isinstance(maker, ImageNetShape)
        maker.save(work)
        with ProcessPoolExecutor(
            processes, multiprocessing.get_context("spawn"), _start_worker, (directory, work)
        ) as pool:
            list(
                pool.map(_work, *zip(*((i, seed, dtype) for i in range(len(shards))), strict=True))
            )
        shutil.rmtree(work)
    store.finish()
    return time.perf_counter() - start


def _description(shards: tuple[Shard, ...]) -> StoreDescription:
    loss = {"loss": "sparse_categorical_crossentropy", "from_logits": True, "loss_options": {}}
    rest = {"layers": "last", "precision": None, "output": None, "class_weights": {}}
    # Compared with that of the stored queries.
    rest["model"] = None
    checkpoints = tuple(
        {"id": name, "path": f"{name}.keras", "step": i, "learning_rate": rate, "sha256": "0" * 64}
        for i, (name, rate) in enumerate(zip(CHECKPOINTS, RATES, strict=True))
    )
    loading = {"model": None, "imports": [], "network": None}
    return StoreDescription({**loss, **rest}, checkpoints, shards, loading)


def _write_shard(store: FactorStore, maker: Maker, index: int, seed: int, dtype: str) -> None:
    shard = store.description.shards[index]
    weights = store.description.sorting_weights
    with ShardWriter(store.paths(shard.name), shard, weights, dtype) as writer:
        for block in blocks(maker, shard, index, seed):
            writer.add(block)
        writer.finish([])


_worker: dict[str, object] = {}


def _start_worker(directory: Path, work: Path) -> None:
    _worker["store"] = FactorStore.open(directory)
    _worker["maker"] = ImageNetShape.load(work, threads=1)


def _work(index: int, seed: int, dtype: str) -> None:
    _write_shard(_worker["store"], _worker["maker"], index, seed, dtype)


if __name__ == "__main__":
    main()
