"""Training losses: the loss of one example and its error signal ∂loss/∂(pre-activations).

To add a loss: write its function beside `softmax_cross_entropy` and register it in `LOSSES`
under its Keras name.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tracin_transforms.core.errors import InputError


class LossValues(NamedTuple):
    """What a loss gives for a batch.

    Attributes:
        error_signals: ∂loss/∂logits, shape [n, C], float64.
        losses: Unreduced loss of each example, shape [n], float64, in nats.
        labels: Index of the labelled class, shape [n], int32.
        predictions: Index of the largest logit, shape [n], int32.
    """

    error_signals: np.ndarray
    losses: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray


LossFunction = Callable[[np.ndarray, np.ndarray], LossValues]


def softmax_cross_entropy(logits: np.ndarray, targets: np.ndarray) -> LossValues:
    r"""Returns the softmax cross-entropy of each example and its error signal.

    With p = softmax(y) and target class t, ``loss = -log p_t`` and ``∂loss/∂y_c = p_c`` for
    c ≠ t. The entry of the label, p_t − 1, is taken as −Σ_{c≠t} p_c, because for a well fitted
    example p_t rounds to 1 long before the sum of the others rounds to 0. The sum of
    the others is added up apart from the label's, so that nothing small is lost beside it.

    Args:
        logits: y, shape [n, C], floating, finite.
        targets: Class indices, shape [n], integer, each in [0, C).

    Returns:
        `LossValues`; each row of error_signals sums to 0 up to rounding.

    Raises:
        InputError: A target is not an integer in [0, C); the message names its row.

    Reference:
        Pruthi et al. (2020), section 4.1: the last layer's gradient as an outer product.
    """
    logits = np.asarray(logits, dtype=np.float64)
    n, classes = logits.shape
    targets = class_indices(targets, n, classes)
    rows = np.arange(n)

    shift = logits.max(axis=1, keepdims=True)
    exponentials = np.exp(logits - shift)
    label_exponential = exponentials[rows, targets].copy()
    exponentials[rows, targets] = 0.0
    others = exponentials.sum(axis=1)
    total = others + label_exponential

    error_signals = exponentials / total[:, None]
    error_signals[rows, targets] = -others / total
    # log p_t = y_t - max - log(total). Where p_t is near 1 the log1p form keeps the digits, and
    # where the label's exponential underflows it would divide by zero.
    fitted = label_exponential >= others
    losses = np.log(total) - (logits[rows, targets] - shift[:, 0])
    losses[fitted] = np.log1p(others[fitted] / label_exponential[fitted])
    return LossValues(
        error_signals=error_signals,
        losses=losses,
        labels=targets.astype(np.int32),
        predictions=logits.argmax(axis=1).astype(np.int32),
    )


def one_hot_cross_entropy(logits: np.ndarray, targets: np.ndarray) -> LossValues:
    """Returns `softmax_cross_entropy` for targets given as one-hot rows, shape [n, C].

    Raises:
        InputError: A row is not one-hot (one 1, all others 0); the message names it.
    """
    targets = np.asarray(targets)
    if targets.shape != logits.shape:
        raise InputError(
            f"one-hot labels have shape {targets.shape}, expected {logits.shape} "
            "(categorical_crossentropy); integer labels need sparse_categorical_crossentropy"
        )
    is_one_hot = ((targets == 0) | (targets == 1)).all(axis=1) & (targets.sum(axis=1) == 1)
    if not is_one_hot.all():
        row = int(np.flatnonzero(~is_one_hot)[0])
        found = f"{targets[row].tolist()}"
        raise RowError(row, f"label {found:.80} is not one-hot: expected one 1, the rest 0")
    return softmax_cross_entropy(logits, targets.argmax(axis=1))


class RowError(InputError):
    """One row of a batch is bad; whoever knows the ids names the example instead of the row."""

    def __init__(self, row: int, problem: str) -> None:
        super().__init__(row, problem)
        self.row = row
        self.problem = problem

    def __str__(self) -> str:
        return f"row {self.row}: {self.problem}"


def class_indices(targets: np.ndarray, n: int, classes: int) -> np.ndarray:
    """Returns the targets as int64 class indices, shape [n].

    Raises:
        InputError: Not n integers in [0, classes).
    """
    targets = np.asarray(targets)
    if targets.ndim == 2 and targets.shape[1] == 1:
        targets = targets[:, 0]
    if targets.shape != (n,) or not np.issubdtype(targets.dtype, np.integer):
        raise InputError(
            f"labels have shape {targets.shape} and dtype {targets.dtype}, expected {n} integers "
            "(sparse_categorical_crossentropy); one-hot labels need categorical_crossentropy"
        )
    outside = (targets < 0) | (targets >= classes)
    if outside.any():
        row = int(np.flatnonzero(outside)[0])
        raise RowError(
            row,
            f"label {int(targets[row])} is out of range: the model has {classes} classes, "
            f"expected 0 to {classes - 1}",
        )
    return targets.astype(np.int64)


LOSSES: dict[str, LossFunction] = {
    "sparse_categorical_crossentropy": softmax_cross_entropy,
    "categorical_crossentropy": one_hot_cross_entropy,
}


def check_loss(name: object) -> None:
    """Raises InputError, naming what is known, if there is no loss of that name."""
    if not isinstance(name, str) or name not in LOSSES:
        raise InputError(f"loss {name!r} is unknown: expected one of {', '.join(sorted(LOSSES))}")
