"""Gradient factors of ImageNet's shape with realistic spectra, to benchmark top-k scoring.

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

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np
from imagenet_latent import BANK, CLASSES, MAIN, WIDTH, Latent, Photographs
from threadpoolctl import threadpool_limits

CHECKPOINTS = ("epoch-030", "epoch-060", "epoch-090")
# Mean cosine of activations of two examples of one class. 0.6 to 0.8 is usual; photographs of
# synonymous classes here have 0.25 to 0.55, those of similar breeds of dogs up to 0.7.
SAME_CLASS = 0.6
# The last one is as the network, whose accuracy on the photographs this is nearly.
ACCURACIES = (0.76, 0.82, 0.865)
FILE = "imagenet_shape.npz"
# Rows that are made together: enough for matrix products; and of these, for all else.
PIECE, _CHUNK = 512, 32


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
            self._latent = Latent.of(photographs)

    @classmethod
    def load(cls, work: Path, threads: int | None = None) -> "ImageNetShape":
        """Returns the generator that is saved in a directory."""
        with np.load(work / FILE) as saved:
            arrays = {f.name: saved[f.name].astype(np.float32) for f in fields(Photographs)}
            knobs = {field.name: saved[field.name].tolist() for field in fields(Knobs)}
        return cls(Photographs(**arrays), Knobs(**knobs), threads)

    def save(self, work: Path) -> None:
        """Saves what `load` needs: 7 MB."""
        arrays = {f.name: getattr(self.photographs, f.name) for f in fields(Photographs)}
        halves = {name: array.astype(np.float16) for name, array in arrays.items()}
        knobs = {field.name: getattr(self.knobs, field.name) for field in fields(Knobs)}
        # Whole or not at all, should another process write it, too.
        temporary = work / f".{os.getpid()}-{FILE}"
        np.savez(temporary, **halves, **knobs)
        temporary.rename(work / FILE)

    def with_knobs(self, knobs: Knobs) -> "ImageNetShape":
        """Returns a generator of other knobs, which shares what does not depend on them."""
        other = object.__new__(ImageNetShape)
        other.photographs, other.knobs = self.photographs, knobs
        other._threads, other._latent = self._threads, self._latent
        return other

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
        starts = range(0, n, PIECE)

        def make(start: int) -> None:
            rng = np.random.default_rng([*seed, first + start // PIECE])
            self._fill(rows.part(slice(start, start + PIECE)), rng, checkpoints)

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
        main = rng.standard_normal((n, MAIN), np.float32)
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
                rows.predictions[chunk, at], rows.losses[chunk, at] = to_error_signals(
                    e[chunk], rows.labels[chunk]
                )

    def _shared(self, rng: np.random.Generator, labels: np.ndarray) -> np.ndarray:
        """Returns what all checkpoints have in common of the latents, shape [n, WIDTH]."""
        n, latent = len(labels), self._latent
        confused = latent.confused(rng, labels)
        far = rng.standard_exponential((n, 1), np.float32) ** np.float32(self.knobs.tail)
        far *= self.knobs.confusion
        # Two rows of a circle, so that no two examples have the same noise.
        picks = rng.integers(0, BANK, (2, n))
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


def _chunks(n: int) -> Iterator[slice]:
    """Returns slices of n rows, of which several arrays fit the cache of a core."""
    return (slice(start, start + _CHUNK) for start in range(0, n, _CHUNK))


def _correlated(rng: np.random.Generator, shared: np.ndarray, correlation: float) -> np.ndarray:
    """Returns normal numbers that have a correlation with others, and their shape."""
    own = rng.standard_normal(shared.shape, np.float32)
    own *= np.float32(np.sqrt(1 - correlation**2))
    own += np.float32(correlation) * shared
    return own


def to_error_signals(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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
