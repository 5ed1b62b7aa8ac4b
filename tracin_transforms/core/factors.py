"""Gradient factors: the gradient of each example, kept as two short vectors.

For a dense layer with pre-activations y = W h + b the gradient of one example is the outer
product ∂ℓ/∂W = e hᵀ and ∂ℓ/∂b = e, with the error signal e = ∂ℓ/∂y and the activation h. A layer
that is applied at several positions, or called several times, has a pair for each, and its
gradient is their sum. An embedding is a dense layer whose activations are one-hot rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tracin_transforms.core.errors import ExampleError

_DTYPES = {
    "activations": (np.dtype("float32"), np.dtype("int32")),
    "error_signals": (np.dtype("float32"),),
}


@dataclass(frozen=True, eq=False)
class LayerFactors:
    """Gradient factors of some examples for the weights of one layer.

    Attributes:
        name: The layer's name; with its part, where a layer has several: ``dense/lora_a``.
        activations: h, shape [n, d] or, at P positions, [n, P, d], float32. One-hot rows are given
            by the index of their 1 instead: shape [n, 1] or [n, P, 1], int32.
        error_signals: e, shape [n, C] or [n, P, C], float32.
        has_bias: Whether the layer has a bias, which adds 1 to every product of activations.
        groups: G, where d and C are those of G independent groups, one after the other: the
            gradient is that of G layers of widths d/G and C/G (a grouped convolution).
    """

    name: str
    activations: np.ndarray
    error_signals: np.ndarray
    has_bias: bool
    groups: int = 1

    def __post_init__(self) -> None:
        for field, dtypes in _DTYPES.items():
            array = getattr(self, field)
            if array.ndim not in (2, 3) or array.dtype not in dtypes:
                names = " ".join(map(str, dtypes))
                raise ValueError(
                    f"{field} of layer {self.name!r}: shape {array.shape} and dtype {array.dtype}, "
                    f"expected [examples, width] or [examples, positions, width] in {names}"
                )
        if self.activations.shape[:-1] != self.error_signals.shape[:-1]:
            raise ValueError(
                f"layer {self.name!r}: activations and error_signals disagree on the examples and "
                f"positions: {self.activations.shape[:-1]} vs {self.error_signals.shape[:-1]}"
            )
        if self.is_one_hot and (self.has_bias or self.groups > 1 or self.activations.shape[-1] > 1):
            raise ValueError(
                f"layer {self.name!r}: one-hot activations of shape {self.activations.shape}: "
                "expected one index each, no bias and no groups"
            )

    def __len__(self) -> int:
        return len(self.activations)

    @property
    def positions(self) -> int:
        """P, the number of positions; 1 if the layer is applied once."""
        return self.activations.shape[1] if self.activations.ndim == 3 else 1

    @property
    def is_one_hot(self) -> bool:
        """Whether the activations are indices of one-hot rows."""
        return self.activations.dtype.kind == "i"

    @property
    def numbers_per_example(self) -> int:
        """How many numbers the factors of one example are."""
        return self.positions * (self.activations.shape[-1] + self.error_signals.shape[-1])

    def rows(self, selection: slice | np.ndarray) -> "LayerFactors":
        """Returns the factors of the selected examples."""
        return replace(
            self,
            activations=self.activations[selection],
            error_signals=self.error_signals[selection],
        )

    def by_group(self) -> "list[LayerFactors]":
        """Returns the factors of each group as those of a layer of its own."""
        if self.groups == 1:
            return [self]
        pairs = zip(
            np.split(self.activations, self.groups, axis=-1),
            np.split(self.error_signals, self.groups, axis=-1),
            strict=True,
        )
        return [LayerFactors(self.name, h, e, self.has_bias) for h, e in pairs]


@dataclass(frozen=True, eq=False)
class GradientFactors:
    """Gradient factors of some examples at one checkpoint, for each layer of the job.

    Attributes:
        checkpoint_id: The checkpoint.
        layers: One entry per layer, all for the same examples.
    """

    checkpoint_id: str
    layers: tuple[LayerFactors, ...]

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError(f"checkpoint {self.checkpoint_id!r}: expected at least one layer")
        counts = {len(layer.activations) for layer in self.layers}
        if len(counts) > 1:
            raise ValueError(
                f"checkpoint {self.checkpoint_id!r}: layers disagree on the number of examples: "
                f"{sorted(counts)}"
            )

    def __len__(self) -> int:
        return len(self.layers[0].activations)

    def rows(self, selection: slice | np.ndarray) -> "GradientFactors":
        """Returns the factors of the selected examples."""
        return replace(self, layers=tuple(layer.rows(selection) for layer in self.layers))

    def scaled(self, factors: np.ndarray) -> "GradientFactors":
        """Returns the factors of gradients that are multiplied by a factor each, shape [n]."""
        layers = []
        for layer in self.layers:
            by_row = factors.astype(np.float32).reshape(-1, *[1] * (layer.error_signals.ndim - 1))
            layers.append(replace(layer, error_signals=by_row * layer.error_signals))
        return replace(self, layers=tuple(layers))


@dataclass(frozen=True, eq=False)
class FactorBlock:
    """Some rows of a shard, with their gradient factors at all K checkpoints.

    This is the element of the pipelines.

    Attributes:
        shard: Name of the shard the rows come from.
        indices: Index of each row within the shard, shape [n], int64.
        example_ids: Shape [n], unicode, unique.
        labels: Class index, int32, or value, float32, shape [n]; [n, m] where an example has
            several.
        predictions: What each checkpoint predicts, in the form of the labels, shape [n, K] or
            [n, K, m].
        losses: Loss at each checkpoint, shape [n, K], float32, in nats.
        gradients: One `GradientFactors` per checkpoint, in order.
    """

    shard: str
    indices: np.ndarray
    example_ids: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray
    losses: np.ndarray
    gradients: tuple[GradientFactors, ...]

    def __post_init__(self) -> None:
        n, checkpoints = len(self.example_ids), len(self.gradients)
        if not checkpoints:
            raise ValueError(f"block of shard {self.shard!r}: expected at least one checkpoint")
        if self.example_ids.dtype.kind != "U":
            raise ValueError(f"example_ids have dtype {self.example_ids.dtype}, expected unicode")
        if self.losses.shape != (n, checkpoints):
            raise ValueError(f"losses have shape {self.losses.shape}, expected {(n, checkpoints)}")
        for field in ("indices", "labels"):
            if len(getattr(self, field)) != n:
                raise ValueError(f"{field} are {len(getattr(self, field))}, expected {n}")
        if self.predictions.shape[:2] != (n, checkpoints):
            raise ValueError(
                f"predictions have shape {self.predictions.shape}, expected {(n, checkpoints)}"
            )
        for gradient in self.gradients:
            if len(gradient) != n:
                raise ValueError(
                    f"checkpoint {gradient.checkpoint_id!r} has factors of {len(gradient)} "
                    f"examples, expected {n}"
                )
            if len(gradient.layers) != len(self.gradients[0].layers):
                raise ValueError(
                    f"checkpoint {gradient.checkpoint_id!r} has factors of {len(gradient.layers)} "
                    f"layers, expected {len(self.gradients[0].layers)}"
                )

    def __len__(self) -> int:
        return len(self.example_ids)

    @property
    def checkpoint_ids(self) -> tuple[str, ...]:
        """Ids of the checkpoints, in order."""
        return tuple(gradient.checkpoint_id for gradient in self.gradients)

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Names of the layers, in order, at the first checkpoint."""
        return tuple(layer.name for layer in self.gradients[0].layers)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the gradient factors take."""
        return sum(
            layer.activations.nbytes + layer.error_signals.nbytes
            for gradient in self.gradients
            for layer in gradient.layers
        )

    def scaled(self, factors: np.ndarray) -> "FactorBlock":
        """Returns the block with each gradient multiplied by a factor.

        Args:
            factors: For each row and checkpoint, shape [n, K].

        Raises:
            ValueError: They have another shape.
        """
        if np.shape(factors) != self.losses.shape:
            raise ValueError(
                f"factors have shape {np.shape(factors)}, expected one for each of the "
                f"examples and checkpoints, {self.losses.shape}"
            )
        scaled = (g.scaled(f) for g, f in zip(self.gradients, factors.T, strict=True))
        return replace(self, gradients=tuple(scaled))

    def gradients_of(self, selection: slice | np.ndarray) -> Iterator[GradientFactors]:
        """Yields the gradient factors of the selected rows, checkpoint by checkpoint."""
        return (gradient.rows(selection) for gradient in self.gradients)

    def rows(self, selection: slice | np.ndarray) -> "FactorBlock":
        """Returns the block of the selected rows."""
        return replace(
            self,
            indices=self.indices[selection],
            example_ids=self.example_ids[selection],
            labels=self.labels[selection],
            predictions=self.predictions[selection],
            losses=self.losses[selection],
            gradients=tuple(gradient.rows(selection) for gradient in self.gradients),
        )


def check_finite(block: FactorBlock) -> FactorBlock:
    """Returns the block if every number in it is finite.

    Raises:
        ExampleError: Numbers are NaN or infinite; the message names example and checkpoint.
    """
    for k, gradient in enumerate(block.gradients):
        finite = np.isfinite(block.losses[:, k])
        for layer in gradient.layers:
            for array in (layer.activations, layer.error_signals):
                # A sum is finite only if its terms are; float64 leaves room for it.
                axes = tuple(range(1, array.ndim))
                finite &= np.isfinite(array.sum(axis=axes, dtype=np.float64))
        if not finite.all():
            rows = np.flatnonzero(~finite).tolist()
            what = (
                "has a non-finite activation, error signal or loss at checkpoint "
                f"{gradient.checkpoint_id!r}; check the example, and whether training had "
                "diverged by then"
            )
            name = f"example {str(block.example_ids[rows[0]])!r} "
            raise ExampleError([(row, what) for row in rows], name)
    return block


def concatenate_blocks(blocks: Sequence[FactorBlock]) -> FactorBlock:
    """Returns one block with the rows of all, in order; the shard is the first one's.

    Raises:
        ValueError: No blocks, or blocks of different checkpoints.
    """
    if not blocks:
        raise ValueError("expected at least one block")
    first = blocks[0]
    if len(blocks) == 1:
        return first
    if any(block.checkpoint_ids != first.checkpoint_ids for block in blocks):
        raise ValueError("expected blocks of the same checkpoints")
    return replace(
        first,
        indices=np.concatenate([block.indices for block in blocks]),
        example_ids=np.concatenate([block.example_ids for block in blocks]),
        labels=np.concatenate([block.labels for block in blocks]),
        predictions=np.concatenate([block.predictions for block in blocks]),
        losses=np.concatenate([block.losses for block in blocks]),
        gradients=tuple(
            _concatenate_gradients([block.gradients[k] for block in blocks])
            for k in range(len(first.gradients))
        ),
    )


def _concatenate_gradients(parts: Sequence[GradientFactors]) -> GradientFactors:
    layers = tuple(
        replace(
            layer,
            activations=np.concatenate([part.layers[i].activations for part in parts]),
            error_signals=np.concatenate([part.layers[i].error_signals for part in parts]),
        )
        for i, layer in enumerate(parts[0].layers)
    )
    return replace(parts[0], layers=layers)
