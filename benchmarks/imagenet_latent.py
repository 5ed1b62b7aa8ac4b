"""What the rows of an ImageNet-shaped benchmark are made of, as 1,000 photographs show it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

WIDTH, CLASSES = 2048, 1000
# Main directions of the noise, which are drawn anew for each row and checkpoint.
MAIN = 64
# Rows of noise in all other directions, of which each example gets two.
BANK = 4096


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
class Latent:
    """What rows are made of: latents before the rectified square, in units of its argument.

    Attributes:
        means: Of each unit, shape [WIDTH].
        prototypes: Those of the photographs, less the means, shape [CLASSES, WIDTH].
        towards: The direction of each class's weights, shape [CLASSES, WIDTH].
        confusing: That of each class and, less so, the most similar ones: what looks like a class
            looks like these; shape [CLASSES, WIDTH].
        main: The main directions of noise, as long as they vary, shape [MAIN, WIDTH].
        bank: Noise in all other directions, shape [BANK, WIDTH].
        main_seen: Their part in the span of the classes' weights, shape [MAIN, WIDTH].
        bank_seen: That of the bank, shape [BANK, WIDTH].
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
    def of(cls, photographs: Photographs) -> "Latent":
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
    main = s[:MAIN, None] * v[:MAIN] / np.sqrt(len(scores), dtype=np.float32)
    others = centred - (u[:, :MAIN] * s[:MAIN]) @ v[:MAIN]
    mixed = rng.standard_normal((BANK, len(scores)), np.float32) @ others
    return main, mixed / np.sqrt(len(scores), dtype=np.float32)


def _within_span(rows: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Returns the part of rows that lies, roughly, in the span of the unit vectors."""
    ridge = np.float32(0.1) * np.eye(len(units), dtype=np.float32)
    return np.linalg.solve(units @ units.T + ridge, units @ rows.T).T @ units
