"""Labels as the formulas of losses take them, and as a reader does."""

from collections.abc import Mapping

import numpy as np

from tracin_transforms.core.errors import ExampleError, InputError

# Kinds of targets that stand for one of several classes.
_CLASSES = ("index", "distribution", "class")
# Labels of any form, class indices or values: those of losses that are not formulas of ours.
INDICES, VALUES = "indices", "values"


def target_rows(kind: str, targets: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Returns targets in the form that formulas take: one number for each output.

    Args:
        kind: `LossFormula.targets`; or ``indices`` or ``values``, of any shape, for a reader.
        targets: As the examples have them: indices of shape [n], or rows.
        shape: Of the outputs, [n, ..., C].

    Returns:
        Shape [n, ..., C], float64; for ``indices`` and ``values`` that of the targets, or of
        indices instead of one-hot rows.

    Raises:
        InputError: The targets do not fit the outputs; ExampleError where it is some rows.
    """
    targets = np.asarray(targets)
    if kind in (INDICES, VALUES):
        return _any_form(kind, targets, shape)
    if kind == "class":
        if targets.shape == shape and shape[-1] > 1:
            _check_values("distribution", targets.astype(np.float64))
            targets = targets.argmax(axis=-1)
        kind = "index"
    if targets.ndim == len(shape) and targets.shape[-1] == 1 and (kind == "index"):
        targets = targets[..., 0]
    if targets.ndim == len(shape) - 1 and shape[-1] == 1 and kind != "index":
        targets = targets[..., None]
    if kind == "index":
        return _one_hot(targets, shape)
    if targets.shape != shape:
        hint = ""
        if targets.ndim < len(shape):
            hint = "; integer labels need sparse_categorical_crossentropy, or to become one-hot"
        raise InputError(
            f"labels have shape {targets.shape}, expected {shape}, as the model's outputs{hint}"
        )
    rows = targets.astype(np.float64)
    _check_values(kind, rows)
    return rows


def _any_form(kind: str, targets: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if kind == VALUES and targets.ndim == 1 and shape[-1] > 1:
        raise InputError(
            f"labels have shape {targets.shape}, outputs {shape}: expected labels with an axis "
            "for the outputs too"
        )
    if kind == INDICES and targets.shape == shape and shape[-1] > 1:
        targets = targets.argmax(axis=-1)
    rows = targets.astype(np.float64)
    _check_values(kind, rows[:, None] if rows.ndim == 1 else rows)
    return rows


def _one_hot(targets: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    classes = shape[-1]
    if classes == 1:
        raise InputError(
            "the model has one output, and the loss takes one of several classes: expected a "
            "binary one, such as binary_crossentropy, or binary_margin for queries"
        )
    if targets.shape != shape[:-1] or targets.dtype.kind not in "iu":
        raise InputError(
            f"labels have shape {targets.shape} and dtype {targets.dtype}, expected integers of "
            f"shape {shape[:-1]}; one-hot labels need categorical_crossentropy"
        )
    outside = (targets < 0) | (targets >= classes)
    if outside.any():
        raise ExampleError(
            [
                (
                    int(at[0]),
                    f"label {int(targets[tuple(at)])} is out of range: the model has {classes} "
                    f"classes, expected 0 to {classes - 1}",
                )
                for at in np.argwhere(outside)
            ]
        )
    return (targets[..., None] == np.arange(classes)).astype(np.float64)


def _check_values(kind: str, rows: np.ndarray) -> None:
    if kind == "distribution":
        good = (rows >= 0).all(axis=-1) & (np.abs(rows.sum(axis=-1) - 1) < 1e-3)
        expected = "one-hot, nor probabilities that sum to 1"
    elif kind == "binary":
        good = ((rows >= -1) & (rows <= 1)).all(axis=-1)
        expected = "0 or 1 for each output"
    else:
        good = np.isfinite(rows).all(axis=-1)
        expected = "finite"
    if not good.all():
        raise ExampleError(
            [
                (int(at[0]), f"label {str(rows[tuple(at)].tolist()):.80} is not {expected}")
                for at in np.argwhere(~good)
            ]
        )


def readable_targets(kind: str, rows: np.ndarray) -> np.ndarray:
    """Returns what a result shows as label: class indices, or the values.

    Args:
        kind: `LossFormula.targets`.
        rows: What `target_rows` returned, shape [n, ..., C].

    Returns:
        Shape [n] or, with several numbers for an example, [n, m]; int32 for class indices and
        for binary labels that are whole numbers, else float32.
    """
    if kind in _CLASSES:
        return _one_each(rows.argmax(axis=-1).astype(np.int32))
    whole = kind == INDICES or (kind == "binary" and (rows == np.round(rows)).all())
    return _one_each(rows.astype(np.int32 if whole else np.float32))


def readable_predictions(kind: str, y: np.ndarray) -> np.ndarray:
    """Returns what a result shows as prediction, as `readable_targets` does for labels.

    Args:
        kind: `LossFormula.targets`.
        y: What the formula takes, shape [n, ..., C].
    """
    if kind in (*_CLASSES, INDICES):
        return _one_each(y.argmax(axis=-1).astype(np.int32))
    if kind == "binary":
        return _one_each((y > 0).astype(np.int32))
    return _one_each(y.astype(np.float32))


def weights_of_classes(
    kind: str, rows: np.ndarray, class_weights: Mapping[int, float]
) -> np.ndarray:
    """Returns the weight of each example's class, as Keras's ``fit(class_weight=...)`` gives it.

    Args:
        kind: `LossFormula.targets`.
        rows: What `target_rows` returned, shape [n, C].
        class_weights: Weight of each class; 1 for those that are not in it.

    Returns:
        Shape [n], float64.

    Raises:
        InputError: The labels are no classes.
    """
    if not class_weights:
        return np.ones(len(rows))
    single = kind in ("binary", INDICES) and rows.size == len(rows)
    if not single and (rows.ndim != 2 or kind not in _CLASSES):
        raise InputError("class weights need one class index, one-hot row or binary label each")
    classes = np.round(rows.ravel()).astype(int) if single else rows.argmax(axis=1)
    return np.array([class_weights.get(int(index), 1.0) for index in classes])


def _one_each(values: np.ndarray) -> np.ndarray:
    flat = values.reshape(len(values), -1)
    return flat[:, 0] if flat.shape[1] == 1 else flat
