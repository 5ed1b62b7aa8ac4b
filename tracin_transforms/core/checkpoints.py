"""The checkpoints of one training run, with what TracIn needs to know about them."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from tracin_transforms.core.errors import InputError

FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """Saved weights, with the learning rate that was in force up to them.

    Attributes:
        id: Name that is unique within the run, e.g. ``epoch-02``.
        path: The saved model.
        learning_rate: η_k of the optimizer's last step before the checkpoint; None if unknown.
        step: Number of optimizer steps taken so far.
        epoch: Number of finished epochs, or None.
        loss: Mean training loss that was reported for the epoch, or None.
        validation_loss: Mean loss on validation data, where there are any, or None.
    """

    id: str
    path: str
    learning_rate: float | None
    step: int
    epoch: int | None = None
    loss: float | None = None
    validation_loss: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not self.id:
            raise InputError(f"checkpoint id {self.id!r}: expected a non-empty string")
        if not isinstance(self.path, str) or not self.path:
            raise InputError(f"checkpoint {self.id!r}: 'path' is {self.path!r}, expected a file")
        if isinstance(self.step, bool) or not isinstance(self.step, int) or self.step < 0:
            raise InputError(
                f"checkpoint {self.id!r}: 'step' is {self.step!r}, expected a whole number >= 0"
            )
        if self.learning_rate is not None and not _is_rate(self.learning_rate):
            raise InputError(
                f"checkpoint {self.id!r}: 'learning_rate' is {self.learning_rate!r}, "
                "expected a finite number >= 0"
            )


@dataclass(frozen=True)
class CheckpointSeries:
    """The ordered checkpoints of one training run.

    Attributes:
        checkpoints: In the order of training.
        loss: Keras name of the training loss, such as ``mean_squared_error``.
        from_logits: Whether the loss took logits (True) or probabilities (False); None for a loss
            that knows no such difference.
        loss_options: The loss's other options, such as ``{"label_smoothing": 0.1}``; JSON values.
        batch_size: Examples per optimizer step, or None if unknown.
        optimizer: Name of the optimizer, or None if unknown.
        output: Name of the model's output that the loss is taken of, where it has several.
        class_weights: What losses are multiplied with, by class; 1 for classes that are not in it.
        model: A ``.keras`` file with the network, where the checkpoints hold weights alone.
    """

    checkpoints: tuple[Checkpoint, ...]
    loss: str
    from_logits: bool | None
    batch_size: int | None = None
    optimizer: str | None = None
    loss_options: Mapping[str, Any] = field(default_factory=dict)
    output: str | None = None
    class_weights: Mapping[int, float] = field(default_factory=dict)
    model: str | None = None

    def __post_init__(self) -> None:
        if not self.checkpoints:
            raise InputError("the run has no checkpoints: expected at least one")
        ids = [checkpoint.id for checkpoint in self.checkpoints]
        repeated = sorted({name for name in ids if ids.count(name) > 1})
        if repeated:
            raise InputError(
                f"checkpoint id {repeated[0]!r} occurs {ids.count(repeated[0])} times: "
                "expected every checkpoint id once"
            )
        for before, after in zip(self.checkpoints, self.checkpoints[1:], strict=False):
            if after.step < before.step:
                raise InputError(
                    f"checkpoint {after.id!r} has step {after.step}, after {before.id!r} with "
                    f"{before.step}: expected the order of training"
                )
        self._check_loss()
        for name in ("output", "model"):
            if not isinstance(getattr(self, name), str | None):
                raise InputError(f"{name!r} is {getattr(self, name)!r:.60}, expected a string")

    def _check_loss(self) -> None:
        if not isinstance(self.loss, str) or not self.loss:
            raise InputError(f"'loss' is {self.loss!r}, expected the Keras name of a loss")
        if self.from_logits is not None and not isinstance(self.from_logits, bool):
            raise InputError(f"'from_logits' is {self.from_logits!r}, expected true, false or null")
        if not isinstance(self.loss_options, Mapping):
            raise InputError(f"'loss_options' is {self.loss_options!r:.60}, expected an object")
        for index, weight in self.class_weights.items():
            if not isinstance(index, int) or not _is_rate(weight):
                raise InputError(
                    f"'class_weights' has {index!r}: {weight!r}, expected a finite number >= 0 for "
                    "each class index"
                )

    def weights(self, kind: str) -> np.ndarray:
        """Returns the weight of each checkpoint in the sum over checkpoints, shape [K], float64.

        Args:
            kind: ``recorded``: η_k, the learning rates, as in TracInCP (Pruthi et al. 2020,
                section 3.2); ``equal``: 1 for each, which the paper finds to work as well.

        Raises:
            InputError: ``recorded`` where a learning rate is missing; another kind.
        """
        if kind == "equal":
            return np.ones(len(self.checkpoints))
        if kind != "recorded":
            raise InputError(f"checkpoint weights {kind!r}: expected 'recorded' or 'equal'")
        missing = [c.id for c in self.checkpoints if c.learning_rate is None]
        if missing:
            raise InputError(
                f"checkpoint {missing[0]!r} has no learning rate ({len(missing)} of "
                f"{len(self.checkpoints)} have none): add 'learning_rate' to checkpoints.json, "
                "give --learning-rates with checkpoint files, or weigh all checkpoints alike with "
                "--checkpoint-weights equal"
            )
        rates = np.array([c.learning_rate for c in self.checkpoints], dtype=np.float64)
        if not rates.any():
            raise InputError(
                "all recorded learning rates are 0, which makes every influence 0: weigh the "
                "checkpoints alike with --checkpoint-weights equal"
            )
        return rates

    def chosen(self, weights: Mapping[str, float]) -> tuple["CheckpointSeries", np.ndarray]:
        """Returns the run with some of its checkpoints, and what these weigh.

        Args:
            weights: Weight of each checkpoint by its id; those without one, or of weight 0, are
                left out.

        Raises:
            InputError: There is no such checkpoint, a weight is no number, or none is left.
        """
        unknown = sorted(weights.keys() - {checkpoint.id for checkpoint in self.checkpoints})
        if unknown:
            raise InputError(
                f"there is no checkpoint {unknown[0]!r} in the run: expected some of "
                f"{', '.join(checkpoint.id for checkpoint in self.checkpoints)}"
            )
        for name, weight in weights.items():
            if not _is_rate(weight):
                raise InputError(
                    f"checkpoint {name!r} has the weight {weight!r}, expected a finite number >= 0"
                )
        left = [checkpoint for checkpoint in self.checkpoints if weights.get(checkpoint.id)]
        if not left:
            raise InputError("no checkpoint has a weight above 0: expected at least one")
        return (
            replace(self, checkpoints=tuple(left)),
            np.array([weights[checkpoint.id] for checkpoint in left], dtype=np.float64),
        )


def series_to_json(series: CheckpointSeries) -> dict[str, Any]:
    """Returns the content of a ``checkpoints.json``."""
    document: dict[str, Any] = {"format": FORMAT, **asdict(series)}
    document["checkpoints"] = [asdict(checkpoint) for checkpoint in series.checkpoints]
    return document


def series_from_json(document: Any) -> CheckpointSeries:
    """Returns the series that a ``checkpoints.json`` describes.

    Raises:
        InputError: A field is missing or cannot be used; the message names it.
    """
    if not isinstance(document, Mapping):
        raise InputError(f"expected an object with 'checkpoints', found {document!r:.60}")
    if document.get("format") != FORMAT:
        raise InputError(f"'format' is {document.get('format')!r}, expected {FORMAT}")
    for name in ("loss", "checkpoints"):
        if name not in document:
            raise InputError(f"field {name!r} is missing")
    entries = document["checkpoints"]
    if not isinstance(entries, list):
        raise InputError(f"'checkpoints' is {entries!r:.60}, expected a list")
    return CheckpointSeries(
        checkpoints=tuple(_checkpoint_from_json(entry, i) for i, entry in enumerate(entries)),
        loss=document["loss"],
        from_logits=document.get("from_logits"),
        batch_size=document.get("batch_size"),
        optimizer=document.get("optimizer"),
        loss_options=document.get("loss_options", {}),
        output=document.get("output"),
        class_weights=_class_weights(document.get("class_weights", {})),
        model=document.get("model"),
    )


def _class_weights(document: Any) -> dict[int, float]:
    """Returns class weights with the class indices as numbers, which JSON has as strings."""
    try:
        return {int(index): weight for index, weight in document.items()}
    except (AttributeError, ValueError) as error:
        raise InputError(
            f"'class_weights' is {document!r:.60}, expected an object of class indices and weights"
        ) from error


def _checkpoint_from_json(entry: Any, index: int) -> Checkpoint:
    if not isinstance(entry, Mapping):
        raise InputError(f"checkpoints[{index}] is {entry!r:.60}, expected an object")
    for name in ("id", "path", "step"):
        if name not in entry:
            raise InputError(f"checkpoints[{index}] has no field {name!r}")
    return Checkpoint(
        id=entry["id"],
        path=entry["path"],
        learning_rate=entry.get("learning_rate"),
        step=entry["step"],
        epoch=entry.get("epoch"),
        loss=entry.get("loss"),
        validation_loss=entry.get("validation_loss"),
    )


def _is_rate(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value >= 0
