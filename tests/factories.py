"""Small random inputs, and a NumPy stand-in for the models, shared by the tests."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tracin_transforms.core.factors import FactorBlock, GradientFactors, LayerFactors
from tracin_transforms.core.losses import softmax_cross_entropy
from tracin_transforms.core.protocols import ExampleBatch, ExampleSource, Shard
from tracin_transforms.core.queries import Queries
from tracin_transforms.core.ranking import TopInfluences
from tracin_transforms.core.targets import target_rows
from tracin_transforms.core.threads import Threads
from tracin_transforms.core.top_scan import TopScan

CLASSES, WIDTH, CHECKPOINTS = 4, 6, 3
WEIGHTS = np.array([0.5, 0.2, 0.1])


def random_block(
    rng: np.random.Generator,
    n: int,
    prefix: str = "z",
    has_bias: bool = True,
    layers: int = 1,
    shard: str = "s",
    positions: int = 1,
    classes: int = CLASSES,
) -> FactorBlock:
    """Returns a block of random factors with ids ``z00000``, ``z00001``, ..."""
    shape = (n,) if positions == 1 else (n, positions)
    return FactorBlock(
        shard=shard,
        indices=np.arange(n),
        example_ids=np.array([f"{prefix}{i:05d}" for i in range(n)], dtype=str),
        labels=rng.integers(0, classes, n).astype(np.int32),
        predictions=rng.integers(0, classes, (n, CHECKPOINTS)).astype(np.int32),
        losses=rng.random((n, CHECKPOINTS), dtype=np.float32),
        gradients=tuple(
            GradientFactors(
                f"epoch-{k}",
                tuple(
                    LayerFactors(
                        f"dense-{i}",
                        rng.standard_normal((*shape, WIDTH + i)).astype(np.float32),
                        rng.standard_normal((*shape, classes)).astype(np.float32),
                        has_bias,
                    )
                    for i in range(layers)
                ),
            )
            for k in range(CHECKPOINTS)
        ),
    )


def ranked(
    blocks: list[FactorBlock], queries: FactorBlock, k: int, weights: np.ndarray = WEIGHTS
) -> TopInfluences:
    """Returns the proponents and opponents that a scan of all pairs finds."""
    scan = TopScan(Queries.prepare(queries, weights), k, Threads(1))
    for block in blocks:
        scan.add(block)
    return scan.top()


def materialised_gradients(block: FactorBlock) -> np.ndarray:
    """Returns each example's gradients, shape [K, L, n, parameters], padded with zeros."""
    checkpoints = []
    for gradient in block.gradients:
        parts = []
        for layer in gradient.layers:
            activations = layer.activations.astype(np.float64)
            if layer.has_bias:
                ones = np.ones((*activations.shape[:-1], 1))
                activations = np.concatenate([activations, ones], axis=-1)
            signals = layer.error_signals.astype(np.float64)
            outer = activations[..., :, None] * signals[..., None, :]
            if outer.ndim == 4:
                outer = outer.sum(axis=1)
            parts.append(outer.reshape(len(activations), -1))
        widest = max(part.shape[1] for part in parts)
        checkpoints.append([np.pad(part, ((0, 0), (0, widest - part.shape[1]))) for part in parts])
    return np.array(checkpoints)


def split(block: FactorBlock, pieces: int) -> list[FactorBlock]:
    """Returns the block's rows in several blocks."""
    return [block.rows(rows) for rows in np.array_split(np.arange(len(block)), pieces)]


@dataclass(frozen=True)
class ArraySource(ExampleSource):
    """Random examples in a given number of shards; the examples do not depend on it."""

    n: int
    number_of_shards: int
    seed: int = 0
    prefix: str = "z"

    def shards(self) -> tuple[Shard, ...]:
        edges = np.linspace(0, self.n, self.number_of_shards + 1).astype(int).tolist()
        return tuple(
            Shard(f"shard-{i}", start=start, count=end - start)
            for i, (start, end) in enumerate(zip(edges[:-1], edges[1:], strict=True))
        )

    def read(self, shard: Shard, batch_size: int) -> Iterator[ExampleBatch]:
        rng = np.random.default_rng(self.seed)
        inputs = rng.standard_normal((self.n, WIDTH)).astype(np.float32)
        targets = rng.integers(0, CLASSES, self.n)
        ids = np.array([f"{self.prefix}{i:05d}" for i in range(self.n)])
        for start in range(shard.start, shard.start + shard.count, batch_size):
            rows = np.arange(start, min(start + batch_size, shard.start + shard.count))
            yield ExampleBatch(
                shard.name, rows - shard.start, ids[rows], inputs[rows], targets[rows]
            )


@dataclass(frozen=True)
class LinearExtractor:
    """K random linear models: the activations are the inputs. Needs neither Keras nor files."""

    seed: int = 1

    def load(self) -> "LinearExtractor":
        return self

    def block_rows(self, limit: int) -> int:
        return limit

    def extract(self, batch: ExampleBatch) -> FactorBlock:
        rng = np.random.default_rng(self.seed)
        rows = target_rows("index", batch.targets, (len(batch), CLASSES))
        losses, gradients, predictions = [], [], []
        for k in range(CHECKPOINTS):
            kernel = rng.standard_normal((WIDTH, CLASSES))
            logits = batch.inputs.astype(np.float64) @ kernel
            loss, signals = softmax_cross_entropy(np, logits, rows)
            losses.append(loss)
            predictions.append(logits.argmax(axis=1).astype(np.int32))
            layer = LayerFactors("dense", batch.inputs, signals.astype(np.float32), has_bias=True)
            gradients.append(GradientFactors(f"epoch-{k}", (layer,)))
        return FactorBlock(
            shard=batch.shard,
            indices=batch.indices,
            example_ids=batch.example_ids,
            labels=batch.targets.astype(np.int32),
            predictions=np.stack(predictions, axis=1),
            losses=np.stack(losses, axis=1).astype(np.float32),
            gradients=tuple(gradients),
        )
