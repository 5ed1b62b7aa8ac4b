"""The loss a model was trained with: read off a compiled model, and applied to a loaded one."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from tracin_transforms.core.checkpoints import CheckpointSeries
from tracin_transforms.core.errors import InputError
from tracin_transforms.core.losses import LOSSES, LossFormula


@dataclass(frozen=True)
class TrainingLoss:
    """The loss of a run.

    Attributes:
        name: Keras name of the loss function.
        from_logits: Whether it takes logits; None where it knows no such difference.
        options: Its other options, where they are not Keras's defaults; JSON values.
    """

    name: str
    from_logits: bool | None
    options: dict[str, Any]

    @property
    def formula(self) -> LossFormula | None:
        """The loss's formula, or None where its error signals come from automatic differentiation.

        Raises:
            InputError: `from_logits` is missing, or given to a loss that takes none.
        """
        formula = LOSSES.get(self.name)
        if formula is None:
            return None
        if formula.end and self.from_logits is None:
            raise InputError(
                f"'from_logits' of loss {self.name!r} is missing: expected true where the loss "
                "takes logits, false where it takes probabilities"
            )
        if not formula.end and self.from_logits:
            raise InputError(f"'from_logits' is true, but loss {self.name!r} has no such option")
        known = inspect.signature(formula.formula).parameters
        return formula if self.options.keys() <= known.keys() else None

    def keras_losses(self, targets: Any, outputs: Any) -> Any:
        """Returns Keras's own loss of each example.

        Args:
            targets: Tensor of the targets, as the loss takes them.
            outputs: Tensor of the model's outputs.

        Returns:
            Shape [n]: the mean over an example's positions, where it has several.

        Raises:
            InputError: The loss is one number for the whole batch.
        """
        if len(targets.shape) == len(outputs.shape) - 1 and outputs.shape[-1] == 1:
            targets = targets[..., None]
        more = {} if self.from_logits is None else {"from_logits": self.from_logits}
        losses = _function(self.name)(targets, outputs, **more, **self.options)
        if not losses.shape.rank:
            raise InputError(f"loss {self.name!r} gives one number for a batch, not one an example")
        return tf.reduce_mean(losses, axis=list(range(1, losses.shape.rank)))

    def check(self) -> None:
        """Raises InputError if Keras has no such loss, or the loss no such option."""
        parameters = inspect.signature(_function(self.name)).parameters
        unknown = sorted(self.options.keys() - parameters.keys())
        if unknown:
            raise InputError(f"loss {self.name!r} has no option {unknown[0]!r}")


def loss_of_series(series: CheckpointSeries) -> TrainingLoss:
    """Returns the loss that ``checkpoints.json`` names.

    Raises:
        InputError: Keras has no such loss, or it has other options.
    """
    loss = TrainingLoss(
        _function(series.loss).__name__, series.from_logits, dict(series.loss_options)
    )
    loss.check()
    return loss


def loss_of_model(model: keras.Model) -> TrainingLoss:
    """Returns the loss of a compiled model.

    Raises:
        InputError: It has several losses or none, or one that is not a function of Keras's kind.
    """
    loss = keras.losses.get(model.loss) if not isinstance(model.loss, list | dict) else None
    if loss is None:
        raise InputError(f"the model's loss is {model.loss!r}: expected one loss")
    function = getattr(loss, "fn", loss)
    if isinstance(function, keras.losses.Loss) or not hasattr(function, "__name__"):
        raise InputError(
            f"the model's loss is {loss!r}: expected one of Keras's, or a function registered "
            "with keras.saving.register_keras_serializable"
        )
    parameters = inspect.signature(function).parameters
    # Not get_config(), which leaves out some, such as Huber's delta.
    config = getattr(loss, "_fn_kwargs", {})
    options = {
        name: value
        for name, value in config.items()
        if name in parameters and value != parameters[name].default
    }
    from_logits = None
    if "from_logits" in parameters:
        options.pop("from_logits", None)
        from_logits = bool(config.get("from_logits", parameters["from_logits"].default))
    return TrainingLoss(function.__name__, from_logits, options)


def _function(name: str) -> Callable[..., Any]:
    try:
        function = keras.losses.get(name)
    except ValueError as error:
        raise InputError(
            f"loss {name!r} is unknown: expected the name of a Keras loss, such as "
            f"{', '.join(sorted(LOSSES)[:3])}"
        ) from error
    found: Callable[..., Any] = getattr(function, "fn", function)
    return found
