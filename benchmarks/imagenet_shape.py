"""Gradient factors of ImageNet's shape with realistic spectra, to benchmark top-k scoring.

    .venv/bin/python benchmarks/imagenet_shape.py DATA_DIR WORK_DIR [--rows N] [--check]

DATA_DIR holds efficientnet_lite0.keras and imagenet_sample/, 1,000 photographs, one of each class.
A generator is fitted to the network's last layer on them, once, and saved in WORK_DIR; loading it
takes no TensorFlow. --check compares its rows with the photographs. Otherwise a store of N training
examples and one of query examples are written to WORK_DIR/train and WORK_DIR/queries, for

    tracin influence --store WORK_DIR/train --queries store:WORK_DIR/queries --k 20 --output RESULT

How a row is made: a Gaussian latent of its class, its noise and a class it is confused with; rows
of one class share the latent of that class's photograph, the noise has the covariance of all
photographs. A rectified square makes activations of it, half of them zero and the others
heavy-tailed as the real ones. They go through the network's own last weights, so that similar
classes are confused; error signals come from the softmax of these logits.

What is assumed, not measured, since there is one photograph of each class: the cosine of
activations of one class, `SAME_CLASS`; that noise within a class has the covariance of all
photographs; and how checkpoints differ: the same examples, 0.95 correlated difficulty, 0.9
correlated noise in the main directions, the accuracies `ACCURACIES`. 2,048 activations are the
network's 1,280 and 768 mixtures of pairs of them. Training and query examples are one population.
"""

import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from measure import parser
from threadpoolctl import threadpool_limits

from tracin_transforms.core.factors import FactorBlock, GradientFactors, LayerFactors
from tracin_transforms.core.protocols import Shard
from tracin_transforms.storage.factor_store import FactorStore
from tracin_transforms.storage.shard_writer import ShardWriter
from tracin_transforms.storage.store_description import StoreDescription

WIDTH, CLASSES = 2048, 1000
CHECKPOINTS, RATES = ("epoch-030", "epoch-060", "epoch-090"), (0.1, 0.1, 0.01)
# The last one is as the network, whose accuracy on the photographs this is nearly.
ACCURACIES = (0.76, 0.82, 0.865)
IMAGENET, QUERIES = 1_281_167, 1_000
# 128 shards; with 1,251 rows there are 1,025, as the 1,024 files of ImageNet and a short one.
SHARD_ROWS, TFRECORD_ROWS = 10_008, 1_251
BLOCK_ROWS = 2048
QUERY_SEED = 1
# Mean cosine of activations of two examples of one class. 0.6 to 0.8 is usual; photographs of
# synonymous classes here have 0.25 to 0.55, those of similar breeds of dogs up to 0.7.
SAME_CLASS = 0.6
# Rows that are made together: enough for matrix products; and of these, for all else.
_PIECE, _CHUNK = 512, 32
# Main directions of the noise, which are drawn anew for each row and checkpoint.
_MAIN = 64
# Rows of noise in all other directions, of which each example gets two.
_BANK = 4096
_QUANTILES = (1, 10, 25, 50, 75, 90, 99)
_FILE = "imagenet_shape.npz"


def main() -> None:
    """Fits the generator unless that was done, then compares, or writes two stores."""
    found = parser(__doc__, "data", "work")
    found.add_argument("--rows", type=int, default=IMAGENET, help="training examples")
    found.add_argument("--shard-rows", type=int, default=SHARD_ROWS, help="rows of each shard")
    found.add_argument("--check", action="store_true", help="compare with the photographs only")
    options = found.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    shape = ImageNetShape.fitted(options.data, options.work)
    if options.check:
        report(shape)
        report_speed(shape)
        return
    write_store(options.work / "queries", shape, QUERIES, seed=QUERY_SEED, prefix="val")
    seconds = write_store(options.work / "train", shape, options.rows, options.shard_rows)
    print(f"{options.rows:,} rows in {seconds:.1f} s: {options.rows / seconds:,.0f} rows/s")


# The generator


@dataclass(frozen=True)
class Knobs:
    """What is fitted; the defaults are where the fit begins.

    Attributes:
        prototype: How much of an example's latent is that of its class.
        quiet: How much of the noise is left out of the span of the classes' weights.
        pull: How far it lies towards the weights of its class.
        spread: Standard deviation of that among examples: their difficulty.
        confusion: How far it lies, usually, towards the weights of another class.
        tail: Power of an exponential number that this is a multiple of: how unequal it is.
        even: Which power of its norm an example's activations are divided by.
        scale: Norm of the activations, nearly.
        temperature: Factor of all logits.
        skew: How much further hard examples lie from the middle than easy ones.
        behind: How much less the pull is at each checkpoint.
    """

    prototype: float = 0.65
    quiet: float = 0.3
    pull: float = 2.7
    spread: float = 1.7
    confusion: float = 2.8
    tail: float = 0.4
    even: float = 0.5
    scale: float = 19.0
    temperature: float = 0.9
    skew: float = 0.75
    behind: tuple[float, ...] = (0.0, 0.0, 0.0)


@dataclass(frozen=True, eq=False)
class Photographs:
    """The network's last layer, and what goes through it for one photograph of each class.

    Attributes:
        activations: Shape [CLASSES, d], not negative.
        logits: Shape [CLASSES, CLASSES].
        weights: Shape [d, CLASSES].
        bias: Shape [CLASSES].
    """

    activations: np.ndarray
    logits: np.ndarray
    weights: np.ndarray
    bias: np.ndarray

    @classmethod
    def computed(cls, data: Path) -> "Photographs":
        """Runs the network over the photographs."""
        import keras
        from efficientnet import _centre

        model = keras.saving.load_model(data / "efficientnet_lite0.keras", compile=False)
        layer = model.get_layer("logits")
        both = keras.Model(model.input, [layer.input, layer.output])
        files = sorted((data / "imagenet_sample").glob("*.JPEG"))
        images = np.stack([_centre(path) for path in files]).astype(np.float32)
        activations, logits = both.predict(images, batch_size=50, verbose=0)
        return cls(activations, logits, *layer.get_weights())


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of all checkpoints.

    Attributes:
        labels: Shape [n], int32.
        activations: Shape [n, WIDTH], for each checkpoint.
        error_signals: Shape [n, CLASSES], for each checkpoint.
        predictions: Shape [n, K], int32.
        losses: Shape [n, K], float32.
    """

    labels: np.ndarray
    activations: tuple[np.ndarray, ...]
    error_signals: tuple[np.ndarray, ...]
    predictions: np.ndarray
    losses: np.ndarray

    @classmethod
    def empty(cls, n: int, checkpoints: int) -> "Rows":
        """Returns memory for rows."""
        return cls(
            np.empty(n, np.int32),
            tuple(np.empty((n, WIDTH), np.float32) for _ in range(checkpoints)),
            tuple(np.empty((n, CLASSES), np.float32) for _ in range(checkpoints)),
            np.empty((n, checkpoints), np.int32),
            np.empty((n, checkpoints), np.float32),
        )

    def part(self, piece: slice) -> "Rows":
        """Returns some of the rows, in the same memory."""
        return Rows(
            self.labels[piece],
            tuple(array[piece] for array in self.activations),
            tuple(array[piece] for array in self.error_signals),
            self.predictions[piece],
            self.losses[piece],
        )


class ImageNetShape:
    """Makes rows of ImageNet's shape.

    Args:
        photographs: What they are like.
        knobs: How they differ from the photographs.
        threads: Pieces that are made at a time; None: one for each core.
    """

    def __init__(self, photographs: Photographs, knobs: Knobs, threads: int | None = None) -> None:
        self.photographs = photographs
        self.knobs = knobs
        self._threads = threads or os.cpu_count() or 1
        # Several threads wait for each other where cores are shared: this takes 2 s in one.
        with threadpool_limits(1):
            self._latent = _Latent.of(photographs)

    @classmethod
    def fitted(cls, data: Path, work: Path) -> "ImageNetShape":
        """Returns the generator that is saved in `work`; first fits it, if none is."""
        if not (work / _FILE).exists():
            fit(Photographs.computed(data)).save(work)
        return cls.load(work)

    @classmethod
    def load(cls, work: Path, threads: int | None = None) -> "ImageNetShape":
        """Returns the generator that is saved in a directory."""
        with np.load(work / _FILE) as saved:
            arrays = {f.name: saved[f.name].astype(np.float32) for f in fields(Photographs)}
            knobs = {field.name: saved[field.name].tolist() for field in fields(Knobs)}
        return cls(Photographs(**arrays), Knobs(**knobs), threads)

    def save(self, work: Path) -> None:
        """Saves what `load` needs: 7 MB."""
        arrays = {f.name: getattr(self.photographs, f.name) for f in fields(Photographs)}
        halves = {name: array.astype(np.float16) for name, array in arrays.items()}
        knobs = {field.name: getattr(self.knobs, field.name) for field in fields(Knobs)}
        # Whole or not at all, should another process write it, too.
        temporary = work / f".{os.getpid()}-{_FILE}"
        np.savez(temporary, **halves, **knobs)
        temporary.rename(work / _FILE)

    def with_knobs(self, knobs: Knobs) -> "ImageNetShape":
        """Returns a generator of other knobs, which shares what does not depend on them."""
        other = object.__new__(ImageNetShape)
        other.photographs, other.knobs = self.photographs, knobs
        other._threads, other._latent = self._threads, self._latent
        return other

    def blocks(
        self, shard: Shard, index: int, seed: int = 0, block_rows: int = BLOCK_ROWS
    ) -> Iterator[FactorBlock]:
        """Yields the blocks of a shard, which depend on nothing but its index, size and the seed.

        Args:
            shard: Its name becomes part of the ids.
            index: Its number.
            seed: Another one gives other examples.
            block_rows: Rows of each block, a multiple of 512.

        Yields:
            Blocks of all checkpoints.
        """
        for start in range(0, shard.count, block_rows):
            n = min(block_rows, shard.count - start)
            rows = self.rows(n, (seed, index), first=start // _PIECE)
            yield _block(shard.name, start, rows)

    def rows(
        self,
        n: int,
        seed: tuple[int, ...],
        first: int = 0,
        checkpoints: tuple[int, ...] = (0, 1, 2),
    ) -> Rows:
        """Returns rows of labels that are uniform.

        Args:
            n: How many.
            seed: Of the random numbers.
            first: Number of the first piece of 512 rows.
            checkpoints: Which.
        """
        rows = Rows.empty(n, len(checkpoints))
        starts = range(0, n, _PIECE)

        def make(start: int) -> None:
            rng = np.random.default_rng([*seed, first + start // _PIECE])
            self._fill(rows.part(slice(start, start + _PIECE)), rng, checkpoints)

        # One thread for each product: numbers are then the same in any process.
        with threadpool_limits(1), ThreadPoolExecutor(self._threads) as pool:
            list(pool.map(make, starts))
        return rows

    def _fill(self, rows: Rows, rng: np.random.Generator, checkpoints: tuple[int, ...]) -> None:
        knobs, latent, n = self.knobs, self._latent, len(rows.labels)
        rows.labels[:] = rng.integers(0, CLASSES, n)
        shared = self._shared(rng, rows.labels)
        towards = latent.towards[rows.labels]
        difficulty = rng.standard_normal((n, 1), np.float32)
        main = rng.standard_normal((n, _MAIN), np.float32)
        for at, k in enumerate(checkpoints):
            h, e = rows.activations[at], rows.error_signals[at]
            easy = _correlated(rng, difficulty, 0.95)
            # The network was trained to be sure of nothing: easy examples are much alike.
            far = np.float32(-knobs.spread / knobs.skew) * np.expm1(-knobs.skew * easy)
            far += knobs.pull - knobs.behind[k]
            np.matmul(_correlated(rng, main, 0.9), self._main, out=h)
            for chunk in _chunks(n):
                self._to_activations(h[chunk], shared[chunk], far[chunk] * towards[chunk])
            np.matmul(h, self._weights, out=e)
            for chunk in _chunks(n):
                e[chunk] += self.photographs.bias
                rows.predictions[chunk, at], rows.losses[chunk, at] = _to_error_signals(
                    e[chunk], rows.labels[chunk]
                )

    def _shared(self, rng: np.random.Generator, labels: np.ndarray) -> np.ndarray:
        """Returns what all checkpoints have in common of the latents, shape [n, WIDTH]."""
        n, latent = len(labels), self._latent
        confused = latent.confused(rng, labels)
        far = rng.standard_exponential((n, 1), np.float32) ** np.float32(self.knobs.tail)
        far *= self.knobs.confusion
        # Two rows of a circle, so that no two examples have the same noise.
        picks = rng.integers(0, _BANK, (2, n))
        angles = rng.uniform(0, 2 * np.pi, (n, 1))
        first, second = (f(angles).astype(np.float32) for f in (np.cos, np.sin))
        found = np.empty((n, WIDTH), np.float32)
        for chunk in _chunks(n):
            part = found[chunk]
            np.take(self._prototypes, labels[chunk], axis=0, out=part, mode="clip")
            part += far[chunk] * latent.confusing[confused[chunk]]
            part += first[chunk] * self._bank[picks[0, chunk]]
            part += second[chunk] * self._bank[picks[1, chunk]]
        return found

    def _to_activations(self, h: np.ndarray, *others: np.ndarray) -> None:
        """Turns latents, less others that are added, into activations, in place."""
        for other in others:
            h += other
        np.maximum(h, 0, out=h)
        h *= h
        norms = np.sqrt(np.einsum("nd,nd->n", h, h)[:, None])
        h *= self.knobs.scale**self.knobs.even * norms ** -np.float32(self.knobs.even)

    @cached_property
    def _main(self) -> np.ndarray:
        return self._as_noise(self._latent.main, self._latent.main_seen)

    @cached_property
    def _bank(self) -> np.ndarray:
        return self._as_noise(self._latent.bank, self._latent.bank_seen)

    def _as_noise(self, rows: np.ndarray, seen: np.ndarray) -> np.ndarray:
        share = np.float32(np.sqrt(max(0.0, 1 - self.knobs.prototype**2)))
        return (rows - np.float32(self.knobs.quiet) * seen) * share

    @cached_property
    def _prototypes(self) -> np.ndarray:
        return self._latent.means + np.float32(self.knobs.prototype) * self._latent.prototypes

    @cached_property
    def _weights(self) -> np.ndarray:
        return self._latent.weights * np.float32(self.knobs.temperature)


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


def _chunks(n: int) -> Iterator[slice]:
    """Returns slices of n rows, of which several arrays fit the cache of a core."""
    return (slice(start, start + _CHUNK) for start in range(0, n, _CHUNK))


def _correlated(rng: np.random.Generator, shared: np.ndarray, correlation: float) -> np.ndarray:
    """Returns normal numbers that have a correlation with others, and their shape."""
    own = rng.standard_normal(shared.shape, np.float32)
    own *= np.float32(np.sqrt(1 - correlation**2))
    own += np.float32(correlation) * shared
    return own


def _to_error_signals(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turns logits into error signals, in place; returns predictions and losses, shape [n]."""
    at = np.arange(len(labels))
    predictions = logits.argmax(axis=1)
    logits -= logits[at, predictions][:, None]
    own = logits[at, labels]
    np.exp(logits, out=logits)
    logits[at, labels] = 0
    others = logits.sum(axis=1)
    total = others + np.exp(own)
    logits *= (1 / total)[:, None]
    # Not p - 1, which loses all digits where p is nearly 1.
    logits[at, labels] = -others / total
    # log(1 + x) where the label is likely, for the same reason.
    likely = own > -1
    losses = np.log(total) - own
    losses[likely] = np.log1p(others[likely] * np.exp(-own[likely]))
    return predictions, losses


@dataclass(frozen=True, eq=False)
class _Latent:
    """What rows are made of: latents before the rectified square, in units of its argument.

    Attributes:
        means: Of each unit, shape [WIDTH].
        prototypes: Those of the photographs, less the means, shape [CLASSES, WIDTH].
        towards: The direction of each class's weights, shape [CLASSES, WIDTH].
        confusing: That of each class and, less so, the most similar ones: what looks like a class
            looks like these; shape [CLASSES, WIDTH].
        main: The main directions of noise, as long as they vary, shape [_MAIN, WIDTH].
        bank: Noise in all other directions, shape [_BANK, WIDTH].
        main_seen: Their part in the span of the classes' weights, shape [_MAIN, WIDTH].
        bank_seen: That of the bank, shape [_BANK, WIDTH].
        weights: Shape [WIDTH, CLASSES].
        similar: All other classes of each, most similar first, shape [CLASSES, CLASSES - 1].
    """

    means: np.ndarray
    prototypes: np.ndarray
    towards: np.ndarray
    confusing: np.ndarray
    main: np.ndarray
    bank: np.ndarray
    main_seen: np.ndarray
    bank_seen: np.ndarray
    weights: np.ndarray
    similar: np.ndarray

    @classmethod
    def of(cls, photographs: Photographs) -> "_Latent":
        """Returns what describes the photographs' activations."""
        rng = np.random.default_rng(0)
        scores, thresholds, scales = _normal_scores(photographs.activations)
        pairs = rng.integers(0, scores.shape[1], (2, WIDTH - scores.shape[1]))
        kept = np.concatenate([np.arange(scores.shape[1]), pairs[0]])
        # Norms as those of fewer units; the sum of two latents varies as each.
        scales = scales[kept] * (scores.shape[1] / WIDTH) ** 0.25
        weights = _widened(photographs.weights.T, pairs).T
        scores = _widened(scores, pairs)
        # Rows that are taken lie in one piece each.
        units = np.ascontiguousarray((weights / np.linalg.norm(weights, axis=0)).T)
        main, bank = _noise(scores, rng)
        similar = np.argsort(-(units @ units.T) + 9 * np.eye(CLASSES), axis=1)[:, :-1]
        confusing = units + sum(0.4 ** (i + 1) * units[similar[:, i]] for i in range(4))
        return cls(
            means=thresholds[kept] * scales,
            prototypes=_evenly_aligned(scores, units) * scales,
            towards=units * scales,
            confusing=confusing.astype(np.float32) * scales,
            main=main * scales,
            bank=bank * scales,
            main_seen=_within_span(main, units) * scales,
            bank_seen=_within_span(bank, units) * scales,
            weights=np.ascontiguousarray(weights * np.float32(np.sqrt(scores.shape[1] / WIDTH))),
            similar=similar,
        )

    def confused(self, rng: np.random.Generator, labels: np.ndarray) -> np.ndarray:
        """Returns another class for each label, similar ones mostly, as the photographs show."""
        ranks = np.exp(1.4 * rng.standard_exponential(len(labels))) - 1
        return self.similar[labels, np.minimum(ranks, CLASSES - 2).astype(np.int64)]


def _normal_scores(activations: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns latents t with activations ≈ (scale max(threshold + t, 0))², and both, by unit.

    Args:
        activations: Shape [n, d].

    Returns:
        Latents of about unit variance, shape [n, d]; thresholds and scales, shape [d].
    """
    from scipy.special import ndtri
    from scipy.stats import norm

    n = len(activations)
    ranks = activations.argsort(axis=0, kind="stable").argsort(axis=0)
    zeros = (activations == 0).mean(axis=0).clip(1 / n, 1 - 1 / n)
    scores = ndtri((ranks + 0.5) / n)
    # The mean of a normal number that is below the threshold.
    scores = np.where(activations == 0, -norm.pdf(ndtri(zeros)) / zeros, scores)
    thresholds = -ndtri(zeros)
    grid = ndtri((np.arange(4000) + 0.5) / 4000)
    moments = (np.maximum(thresholds[:, None] + grid, 0) ** 4).mean(axis=1)
    scales = ((activations.astype(np.float64) ** 2).mean(axis=0) / moments) ** 0.25
    return tuple(array.astype(np.float32) for array in (scores, thresholds, scales))


def _widened(rows: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Returns rows with a further entry for each pair of entries: their sum over √2."""
    sums = (rows[:, pairs[0]] + rows[:, pairs[1]]) * np.float32(0.5**0.5)
    return np.concatenate([rows, sums], axis=1)


def _evenly_aligned(scores: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Returns latents that lie about equally far towards the weights of their classes.

    A photograph is one example of its class, easy or hard; the class's mean is not as extreme.
    """
    along = (scores * units).sum(axis=1, keepdims=True)
    return scores + 0.85 * (along.mean() - along) * units


def _noise(scores: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns main directions, and rows of noise in the others, with the covariance of `scores`."""
    centred = scores - scores.mean(axis=0)
    u, s, v = np.linalg.svd(centred, full_matrices=False)
    main = s[:_MAIN, None] * v[:_MAIN] / np.sqrt(len(scores), dtype=np.float32)
    others = centred - (u[:, :_MAIN] * s[:_MAIN]) @ v[:_MAIN]
    mixed = rng.standard_normal((_BANK, len(scores)), np.float32) @ others
    return main, mixed / np.sqrt(len(scores), dtype=np.float32)


def _within_span(rows: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Returns the part of rows that lies, roughly, in the span of the unit vectors."""
    ridge = np.float32(0.1) * np.eye(len(units), dtype=np.float32)
    return np.linalg.solve(units @ units.T + ridge, units @ rows.T).T @ units


# The fit


def fit(photographs: Photographs) -> ImageNetShape:
    """Returns the generator whose rows at the last checkpoint are most as the photographs."""
    from scipy.optimize import minimize

    shape = ImageNetShape(photographs, Knobs())
    names = [field.name for field in fields(Knobs) if field.name != "behind"]
    wanted = _features(_of_photographs(photographs))

    def distance(logs: np.ndarray) -> float:
        tried = shape.with_knobs(replace(Knobs(), **dict(zip(names, np.exp(logs), strict=True))))
        found = _features(_of_rows(tried, 1000, 2))
        return float(np.sum((found - wanted) ** 2)) + 10 * max(0.0, logs[0] + 0.01) ** 2

    start = np.log([getattr(shape.knobs, name) for name in names])
    simplex = start + 0.15 * np.eye(len(names) + 1, len(names), k=-1)
    options = {"maxfev": 400, "adaptive": True, "fatol": 1e-3, "initial_simplex": simplex}
    found = minimize(distance, start, method="Nelder-Mead", options=options)
    knobs = replace(Knobs(), **dict(zip(names, np.exp(found.x).tolist(), strict=True)))
    print(f"fitted to {found.fun:.3f} after {found.nfev} trials", flush=True)
    behind = [_behind(shape.with_knobs(knobs), accuracy) for accuracy in ACCURACIES[:-1]]
    return shape.with_knobs(replace(knobs, behind=(*behind, 0.0)))


def _behind(shape: ImageNetShape, accuracy: float) -> float:
    """Returns how much less the pull is at a checkpoint that has an accuracy."""
    low, high = 0.0, 8.0
    for _ in range(8):
        middle = (low + high) / 2
        tried = shape.with_knobs(replace(shape.knobs, behind=(middle,)))
        rows = tried.rows(4096, (2, 0), checkpoints=(0,))
        better = (rows.predictions[:, 0] == rows.labels).mean() > accuracy
        low, high = (middle, high) if better else (low, middle)
    return middle


def _of_photographs(photographs: Photographs) -> dict[str, np.ndarray]:
    labels = np.arange(CLASSES)
    signals = photographs.logits.copy()
    predictions, losses = _to_error_signals(signals, labels)
    found = statistics(photographs.activations, signals, predictions, losses, labels)
    found["cosine, same class"] = np.full(1, SAME_CLASS)
    return found


def _of_rows(shape: ImageNetShape, n: int, checkpoint: int) -> dict[str, np.ndarray]:
    rows = shape.rows(n, (3, 0), checkpoints=(checkpoint,))
    return statistics(
        rows.activations[0],
        rows.error_signals[0],
        rows.predictions[:, 0],
        rows.losses[:, 0],
        rows.labels,
    )


def statistics(
    activations: np.ndarray,
    signals: np.ndarray,
    predictions: np.ndarray,
    losses: np.ndarray,
    labels: np.ndarray,
) -> dict[str, np.ndarray]:
    """Returns samples of the quantities that are compared, by their names.

    Args:
        activations: Shape [n, d].
        signals: Error signals, shape [n, CLASSES].
        predictions: Shape [n].
        losses: Shape [n].
        labels: Shape [n].
    """
    norms = np.linalg.norm(activations, axis=1)
    squares = -np.partition(-(signals**2), 8, axis=1)[:, :9]
    squares = -np.sort(-squares, axis=1)
    whole = (signals**2).sum(axis=1)
    wrong = signals.copy()
    wrong[np.arange(len(labels)), labels] = 0
    wrong = -np.sort(-np.partition(wrong, CLASSES - 20, axis=1)[:, -20:], axis=1)
    mass = -signals[np.arange(len(labels)), labels]
    units = activations / norms[:, None]
    cosines = units @ units.T
    upper = np.triu(np.ones(cosines.shape, bool), 1)
    same = labels[:, None] == labels
    rms = np.sqrt(np.mean(norms**2) / activations.shape[1])
    return {
        "p of the label": np.exp(-losses),
        "‖e‖": np.sqrt(whole),
        "‖h‖": norms,
        **{f"share of ‖e‖² in {k}": squares[:, :k].sum(axis=1) / whole for k in (1, 2, 8)},
        **{f"wrong p in {k}": wrong[:, :k].sum(axis=1) / mass for k in (1, 5, 20)},
        "entries of h / rms": activations.ravel()[::7] / rms,
        "cosine, other class": cosines[upper & ~same],
        "cosine, same class": cosines[upper & same],
        "accuracy": np.full(1, (predictions == labels).mean()),
    }


def _features(found: dict[str, np.ndarray]) -> np.ndarray:
    """Returns numbers whose squared distance says how alike two sets of statistics are."""
    parts = []
    for name, values in found.items():
        if name in ("cosine, same class", "accuracy"):
            parts.append(np.array([20 * np.mean(values)]))
            continue
        q = np.percentile(values, _QUANTILES).clip(1e-6)
        if name.startswith(("p of", "share", "wrong")):
            parts.append(0.5 * np.log(q / (1 - q).clip(1e-5)))
        elif name == "cosine, other class":
            parts.append(5 * q)
        elif name == "‖e‖":
            parts.append(np.log(q))
        elif name == "‖h‖":
            parts.append(6 * np.log(q))
    # Few photographs tell the outermost quantiles.
    for part in parts:
        part[[0, -1]] *= 0.5 if len(part) > 1 else 1.0
    return np.concatenate(parts)


# Reports


def report(shape: ImageNetShape) -> None:
    """Prints quantiles of the photographs, and of rows at each checkpoint."""
    print(shape.knobs)
    sources = {"photographs": _of_photographs(shape.photographs)}
    sources |= {name: _of_rows(shape, 5000, k) for k, name in enumerate(CHECKPOINTS)}
    print(f"{'':32}" + "".join(f"{q:>8} %" for q in _QUANTILES))
    for what in sources["photographs"]:
        for i, (name, found) in enumerate(sources.items()):
            values = found[what]
            if len(values) > 1:
                text = "".join(f"{v:10.4f}" for v in np.percentile(values, _QUANTILES))
            else:
                text = f"{values[0]:10.4f}" + (" assumed" if "same" in what and not i else "")
            print(f"{what if not i else '':20}{name:12}{text}")


def report_speed(shape: ImageNetShape) -> None:
    """Prints how fast blocks are made, beside bare matrix products in the same threads."""
    rows, seconds, bare = 2 * SHARD_ROWS, 0.0, 0.0
    a, b = (np.ones(s, np.float32) for s in ((_PIECE, WIDTH), (WIDTH, CLASSES)))
    for i in range(2):
        start = time.perf_counter()
        for _ in shape.blocks(Shard("speed", count=SHARD_ROWS, size=SHARD_ROWS), i):
            pass
        seconds += time.perf_counter() - start
        start = time.perf_counter()
        with threadpool_limits(1), ThreadPoolExecutor() as pool:
            list(pool.map(lambda _: a @ b, range(3 * SHARD_ROWS // _PIECE)))
        bare += time.perf_counter() - start
    print(
        f"{rows / seconds:,.0f} rows/s of {len(CHECKPOINTS)} checkpoints in {os.cpu_count()} "
        f"threads; bare products of the logits alone {rows / bare:,.0f} rows/s "
        f"({6e-9 * rows * WIDTH * CLASSES / bare:,.0f} GFLOP/s), load {os.getloadavg()[0]:.1f}"
    )


# Stores


def write_store(
    directory: Path,
    shape: ImageNetShape,
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
        shape: Makes the rows.
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
            _write_shard(store, shape, i, seed, dtype)
    else:
        work = directory.parent / f".{directory.name}-{os.getpid()}"
        work.mkdir()
        shape.save(work)
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


def _write_shard(
    store: FactorStore, shape: ImageNetShape, index: int, seed: int, dtype: str
) -> None:
    shard = store.description.shards[index]
    weights = store.description.sorting_weights
    with ShardWriter(store.paths(shard.name), shard, weights, dtype) as writer:
        for block in shape.blocks(shard, index, seed):
            writer.add(block)
        writer.finish([])


_worker: dict[str, object] = {}


def _start_worker(directory: Path, work: Path) -> None:
    _worker["store"] = FactorStore.open(directory)
    _worker["shape"] = ImageNetShape.load(work, threads=1)


def _work(index: int, seed: int, dtype: str) -> None:
    _write_shard(_worker["store"], _worker["shape"], index, seed, dtype)


if __name__ == "__main__":
    main()
