"""The loss of a run: read off a compiled model, and applied to a loaded one."""

import inspect
import json
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from tracin_transforms.core.checkpoints import CheckpointSeries
from tracin_transforms.core.errors import InputError
from tracin_transforms.core.losses import LOSSES, QUERY_LOSSES, LossFormula
from tracin_transforms.models.model_ends import output_names


@dataclass(frozen=True)
class TrainingLoss:
    """The loss of a run, or of its queries.

    Attributes:
        name: Keras name of the loss function, or one of `QUERY_LOSSES`.
        from_logits: Whether it takes logits; None where it knows no such difference.
        options: Its other options, where they are not Keras's defaults; JSON values.
        sums_positions: Whether an example's loss is the sum over its positions, as with Keras's
            reduction ``sum``, instead of their mean.
    """

    name: str
    from_logits: bool | None
    options: dict[str, Any]
    sums_positions: bool = False

    @property
    def formula(self) -> LossFormula | None:
        """The loss's formula, or None where its error signals come from automatic differentiation.

        Raises:
            InputError: `from_logits` is missing, or given to a loss that takes none.
        """
        formula = LOSSES.get(self.name) or QUERY_LOSSES.get(self.name)
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

    @property
    def takes_sigmoid(self) -> bool:
        """Whether it takes what a sigmoid gives, or the logits of one."""
        known = LOSSES.get(self.name) or QUERY_LOSSES.get(self.name)
        return known is not None and known.end == "sigmoid"

    def by_position(self, outputs: Any, targets: Any, rows: Any) -> tf.Tensor:
        """Returns the losses by Keras's own function, for automatic differentiation.

        Args:
            outputs: Tensor of the model's outputs, shape [n, ..., C].
            targets: Tensor of the targets as the examples have them, which Keras's losses take.
            rows: The same as `core.targets.target_rows` returns them, for `QUERY_LOSSES`.

        Returns:
            Shape [n], or [n, ...] where examples have several positions. Keras's mask of positions
            that do not count may be on it.

        Raises:
            InputError: The loss is one number for the whole batch.
        """
        outputs = _widened(outputs)
        if self.name in QUERY_LOSSES:
            logits = outputs if self.from_logits else self._logits(outputs)
            losses, _ = QUERY_LOSSES[self.name].formula(
                keras.ops, logits, tf.cast(rows, logits.dtype)
            )
            return losses
        targets = tf.cast(targets, outputs.dtype)
        if len(targets.shape) == len(outputs.shape) - 1 and outputs.shape[-1] == 1:
            targets = targets[..., None]
        losses = self._called(targets, outputs)
        if not losses.shape.rank:
            raise InputError(f"loss {self.name!r} gives one number for a batch, not one an example")
        return losses

    def _called(self, targets: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
        """Returns what the Keras function, or the user's, gives."""
        function, more = _keras_loss(self.name), dict(self.options)
        is_class = inspect.isclass(function)
        if is_class:
            function, more = function.from_config(more).call, {}
        elif self.from_logits is not None:
            more["from_logits"] = self.from_logits
        refusals = (TypeError, ValueError, tf.errors.InvalidArgumentError)
        try:
            return function(targets, outputs, **more)
        except refusals:
            # A user's own may have float32 written into it, in which Keras calls it.
            targets, outputs = tf.cast(targets, tf.float32), tf.cast(outputs, tf.float32)
        try:
            return function(targets, outputs, **more)
        except refusals as error:
            raise InputError(
                f"loss {self.name!r} does not take labels of shape {targets.shape} and outputs of "
                f"shape {outputs.shape}: {' '.join(str(error).split()):.200}"
            ) from error

    def _logits(self, probabilities: tf.Tensor) -> tf.Tensor:
        logits = getattr(probabilities, "_keras_logits", None)
        if logits is not None:
            return logits
        if self.name == "logit":
            raise InputError(
                "the model hides the logits behind its probabilities, which do not tell them: "
                "expected margin instead of logit"
            )
        return log_odds(probabilities) if self.takes_sigmoid else tf.math.log(probabilities)

    def check(self) -> None:
        """Raises InputError if there is no such loss, or the loss has no such option."""
        found = QUERY_LOSSES[self.name].formula if self.name in QUERY_LOSSES else None
        parameters = inspect.signature(found or _keras_loss(self.name)).parameters
        unknown = sorted(self.options.keys() - parameters.keys())
        if unknown and not any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
            raise InputError(f"loss {self.name!r} has no option {unknown[0]!r}")


def log_odds(probabilities: tf.Tensor) -> tf.Tensor:
    """Returns the logits ``log(p / (1 − p))`` of what a sigmoid gave, of the same shape."""
    return tf.math.log(probabilities) - tf.math.log1p(-probabilities)


def loss_of_series(series: CheckpointSeries) -> TrainingLoss:
    """Returns the loss that ``checkpoints.json`` names.

    Raises:
        InputError: Keras has no such loss, or it has other options.
    """
    options = dict(series.loss_options)
    reduction = options.pop("reduction", None)
    if reduction not in (None, "sum"):
        raise InputError(f"loss option 'reduction' is {reduction!r}, expected 'sum' or none")
    name = series.loss
    if name not in QUERY_LOSSES:
        name = keras.saving.get_registered_name(_keras_loss(name))
    loss = TrainingLoss(name, series.from_logits, options, reduction == "sum")
    loss.check()
    return loss


def loss_of_model(model: keras.Model, output: str | None = None) -> TrainingLoss:
    """Returns the loss of a compiled model.

    Args:
        model: The model.
        output: Which of its outputs, where it has several.

    Raises:
        InputError: It has several losses or none, or one that cannot be recorded.
    """
    given = _loss_of_output(model, output)
    loss = None if given is None else keras.losses.get(given)
    if loss is None:
        raise InputError(f"the model's loss is {given!r}: expected one loss")
    is_sum = getattr(loss, "reduction", None) == "sum"
    function = getattr(loss, "fn", loss)
    if isinstance(function, keras.losses.Loss):
        return _loss_of_class(function, is_sum)
    name = _recorded_name(function)
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
    return TrainingLoss(name, from_logits, options, is_sum)


def _loss_of_output(model: keras.Model, output: str | None) -> Any:
    losses, names = model.loss, output_names(model)
    outputs = getattr(model, "output", None) if names else None
    if isinstance(outputs, dict):
        names = list(outputs)
        if isinstance(losses, list | tuple):
            raise InputError(
                f"the model has outputs by name and a list of losses: expected losses by name, "
                f"as in {dict(zip(names, losses, strict=False))!r}"
            )
    if isinstance(losses, list | tuple) and len(losses) == len(names):
        losses = dict(zip(names, losses, strict=True))
    if output is None:
        if len(names) > 1 or isinstance(losses, list | tuple | dict):
            raise InputError(
                f"the model has the losses {losses!r}: expected one loss; name the output to "
                f"record, one of {', '.join(names)}, as in CheckpointRecorder(..., output=NAME)"
            )
        return losses
    known = list(losses) if isinstance(losses, dict) else names
    if output not in known:
        raise InputError(f"the model has no loss of an output {output!r}: expected one of {known}")
    return losses[output] if isinstance(losses, dict) else losses


def _loss_of_class(loss: keras.losses.Loss, is_sum: bool) -> TrainingLoss:
    name = _recorded_name(type(loss))
    config = loss.get_config()
    options = {key: config[key] for key in config.keys() - {"name", "reduction", "dtype"}}
    try:
        json.dumps(options)
    except TypeError as error:
        raise InputError(
            f"the model's loss {name!r} has the configuration {options!r:.200}: expected values "
            f"that JSON can hold ({error})"
        ) from error
    return TrainingLoss(name, None, options, is_sum)


def _recorded_name(loss: Any) -> str:
    """Returns the name by which a loss function or class is found again."""
    if hasattr(loss, "__name__"):
        name: str = keras.saving.get_registered_name(loss)
        try:
            if _keras_loss(name) is loss:
                return name
        except InputError:
            pass
    raise InputError(
        f"the model's loss is {loss!r}: expected one of Keras's, or a function or class registered "
        "with keras.saving.register_keras_serializable"
    )


def _keras_loss(name: str) -> Any:
    """Returns a loss function, or a user's registered function or class."""
    found = keras.saving.get_registered_object(name)
    if found is None:
        try:
            found = keras.losses.get(name)
        except ValueError as error:
            registered = ", ".join(sorted(keras.saving.get_custom_objects()))
            raise InputError(
                f"loss {name!r} is unknown: expected the name of a Keras loss, such as "
                f"{', '.join(sorted(LOSSES)[:3])}; for queries also {', '.join(QUERY_LOSSES)}; or "
                f"one that a module given with --import registers ({registered or 'none does'})"
            ) from error
    return getattr(found, "fn", found)


def _widened(outputs: tf.Tensor) -> tf.Tensor:
    """Returns outputs in float32 or wider, as Keras gives them to a loss."""
    if outputs.dtype in (tf.float32, tf.float64):
        return outputs
    wide = tf.cast(outputs, tf.float32)
    logits = getattr(outputs, "_keras_logits", None)
    if logits is not None:
        wide._keras_logits = tf.cast(logits, tf.float32)
    return wide
