"""A Keras callback that records the checkpoints of a training run as TracIn needs them."""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import keras

from tracin_transforms.core.checkpoint_choice import (
    EVENLY,
    VALIDATION_LOSS,
    CheckpointSummary,
    drop_below,
    propose,
)
from tracin_transforms.core.checkpoints import Checkpoint, CheckpointSeries
from tracin_transforms.core.errors import InputError
from tracin_transforms.core.recording import Recording
from tracin_transforms.models.checkpoint_writer import (
    needs_network_file,
    remove_checkpoint,
    write_checkpoint,
    write_network,
)
from tracin_transforms.models.factor_function import FactorFunction
from tracin_transforms.models.layers import check_recordable
from tracin_transforms.models.loss_meter import LossMeter
from tracin_transforms.models.training_loss import TrainingLoss, loss_of_model
from tracin_transforms.storage.checkpoint_series import FILE_NAME, write_checkpoint_series
from tracin_transforms.storage.files import local_path

_NETWORK = "model.keras"


class CheckpointRecorder(keras.callbacks.Callback):
    """Writes checkpoints and ``checkpoints.json`` while a model trains.

    Loss, optimizer, batch size, and for each checkpoint the learning rate of its last step, are
    taken from the model. After every checkpoint the directory is complete and can be used::

        model.fit(x, y, epochs=12, callbacks=[CheckpointRecorder("run", every=2)])

    Where the same model is fitted again with the same recorder, the run goes on and its epochs are
    counted on.

    Args:
        directory: The run's directory; made if it does not exist.
        every: Record after every so many epochs; the default is 1.
        epochs: Record after these epochs instead, counted from 1.
        every_steps: Record after every so many optimizer steps instead.
        steps: Record after these steps instead, counted from 1.
        loss_drop: Record only where the loss fell by this share, 0 to 1, since the last checkpoint.
        keep: Keep so many checkpoints at most, to bound the space they take; None keeps all.
        keep_by: Which ones: ``evenly`` spaced; those of lowest ``validation-loss``, after epochs
            of a fit with validation_data; or those of largest ``loss-drop`` below all recorded
            before, of which the first has none.
        output: Name of the output whose loss counts, where the model has several.
        class_weights: What is given to ``fit`` as class_weight, which a callback cannot see.

    Raises:
        InputError: The arguments do not fit each other. When training begins: the directory
            already holds a run, the model or its loss is not supported, nothing would be recorded,
            or this recorder has recorded another model. When a checkpoint is due: it is to be
            chosen by a validation loss that there is none of.
    """

    def __init__(
        self,
        directory: str | Path,
        every: int | None = None,
        epochs: Collection[int] | None = None,
        every_steps: int | None = None,
        steps: Collection[int] | None = None,
        loss_drop: float | None = None,
        keep: int | None = None,
        keep_by: str = EVENLY,
        output: str | None = None,
        class_weights: Mapping[int, float] | None = None,
    ) -> None:
        super().__init__()
        if all(choice is None for choice in (every, epochs, every_steps, steps)):
            every = 1
        self._plan = Recording(every, epochs, every_steps, steps, loss_drop, keep, keep_by)
        self._directory = local_path(directory)
        self._output = output
        self._class_weights = dict(class_weights or {})
        # Those that are kept, and the losses at all that were recorded.
        self._kept: list[CheckpointSummary] = []
        self._losses: list[float | None] = []
        self._recorded: tuple[keras.Model, TrainingLoss] | None = None
        self._is_checked = False
        self._batch_size: int | None = None
        self._meter = LossMeter()
        # The learning rate, and after how many of the optimizer's steps it was noted.
        self._noted = (math.nan, 0)
        # What the fits before this one did.
        self._epochs_before: int | None = 0
        self._steps_before = 0
        self._finished_epochs = 0
        self._finished_steps = 0
        self._steps_before_epoch = 0

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Validates model, loss and plan, and makes the directory."""
        if self._recorded is None and (self._directory / FILE_NAME).exists():
            raise InputError(
                f"{str(self._directory)!r} already holds a training run: choose another directory"
            )
        loss = loss_of_model(self.model, self._output)
        loss.check()
        if self._recorded not in (None, (self.model, loss)):
            raise InputError(
                "this CheckpointRecorder has recorded another model, or the same with another "
                "loss: use one recorder, with a directory of its own, for each training run"
            )
        if self.model.built:
            self._check_model(loss)
        self._check_that_something_is_due()
        self._recorded = (self.model, loss)
        self._directory.mkdir(parents=True, exist_ok=True)
        if needs_network_file(self.model):
            write_network(self.model, self._directory / _NETWORK)
        # A model that was compiled again counts its steps from 0, and `fit` its epochs.
        self._steps_before = max(0, self._finished_steps - int(self.model.optimizer.iterations))
        self._epochs_before = None

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Finds out, in a fit's first epoch, whether it counts on from the fit before."""
        if self._epochs_before is None:
            self._epochs_before = max(0, self._finished_epochs - epoch)
        self._steps_before_epoch = int(self.model.optimizer.iterations) + self._steps_before
        self._meter.begin_epoch()

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Notes the learning rate, before the step, where a checkpoint follows or may follow.

        Afterwards a schedule already gives the next step's, and another callback may have changed
        it at the epoch's end.
        """
        steps, together = self.params.get("steps"), self.model.steps_per_execution
        before = self._steps_before_epoch + batch
        ends_epoch = steps is None or batch + together >= steps
        if ends_epoch or (self._plan.by_step and self._plan.is_due(before, before + together)):
            self._note_learning_rate()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Notes the batch size, and writes the checkpoint if one is due after this step."""
        if not self._is_checked and self._recorded is not None:
            # Keras has built the model only now.
            self._check_model(self._recorded[1])
        if self._batch_size is None:
            self._batch_size = self._meter.examples(self.model) // (batch + 1) or None
        if self._plan.by_step:
            before, now = self._finished_steps, self._steps_before_epoch + batch + 1
            self._finished_steps = now
            if self._plan.is_due(before, now):
                self._record(f"step-{now:06d}", self._meter.mean_since_last(self.model), None)

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Reads the training loss, before validation makes Keras start anew."""
        self._meter.end_epoch(self.model)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Writes the checkpoint, if one is due, and then ``checkpoints.json``."""
        steps = int(self.model.optimizer.iterations)
        if steps - self._noted[1] > self.model.steps_per_execution:
            # The data ended before the step that was to be the last.
            self._note_learning_rate()
        before = self._finished_epochs
        self._finished_epochs = epoch + 1 + (self._epochs_before or 0)
        self._finished_steps = steps + self._steps_before
        self._meter.end_epoch(self.model)
        if not self._plan.by_step and self._plan.is_due(before, self._finished_epochs):
            values = logs or {}
            self._record(
                f"epoch-{self._finished_epochs:03d}", values.get("loss"), values.get("val_loss")
            )

    def _check_model(self, loss: TrainingLoss) -> None:
        what = f"model {self.model.name!r}"
        layers = check_recordable(self.model, what)
        FactorFunction(self.model, loss, what, layers, self._output).check()
        self._is_checked = True

    def _check_that_something_is_due(self) -> None:
        epochs, steps = int(self.params["epochs"]), self.params.get("steps")
        if self._kept or (self._plan.by_step and steps is None):
            return
        unit, last = ("steps", epochs * (steps or 0)) if self._plan.by_step else ("epochs", epochs)
        if self._plan.first_due() > last:
            raise InputError(
                f"training ends after {last} {unit}, but the first checkpoint is due after "
                f"{self._plan.first_due()}: none would be recorded"
            )

    def _note_learning_rate(self) -> None:
        optimizer = self.model.optimizer
        self._noted = (float(optimizer.learning_rate), int(optimizer.iterations))

    def _record(self, name: str, loss: float | None, validation_loss: float | None) -> None:
        """Writes a checkpoint, unless the loss is too high, and drops one that is too many."""
        loss = None if loss is None else float(loss)
        if not self._plan.has_dropped(self._losses[-1] if self._losses else None, loss):
            return
        if self._plan.keep_by == VALIDATION_LOSS and validation_loss is None:
            raise InputError(
                "keep_by='validation-loss', but epoch "
                f"{self._finished_epochs} has no validation loss: expected "
                "fit(..., validation_data=...), at every epoch that is recorded"
            )
        checkpoint = Checkpoint(
            id=name,
            path=write_checkpoint(self.model, self._directory, name),
            learning_rate=self._noted[0],
            step=self._finished_steps,
            epoch=None if self._plan.by_step else self._finished_epochs,
            loss=loss,
            validation_loss=None if validation_loss is None else float(validation_loss),
        )
        self._kept.append(CheckpointSummary(checkpoint, loss, drop_below(self._losses, loss)))
        self._losses.append(loss)
        dropped = self._drop_too_many()
        write_checkpoint_series(self._directory, self._series())
        # Only when no checkpoints.json names them any more.
        for checkpoint in dropped:
            remove_checkpoint(self._directory / checkpoint.path)

    def _drop_too_many(self) -> list[Checkpoint]:
        keep = self._plan.keep
        if keep is None or len(self._kept) <= keep:
            return []
        chosen = propose(self._kept, keep, self._plan.keep_by)
        dropped = [s.checkpoint for s in self._kept if s.checkpoint not in chosen]
        self._kept = [s for s in self._kept if s.checkpoint in chosen]
        return dropped

    def _series(self) -> CheckpointSeries:
        loss = loss_of_model(self.model, self._output)
        options = loss.options | ({"reduction": "sum"} if loss.sums_positions else {})
        return CheckpointSeries(
            checkpoints=tuple(summary.checkpoint for summary in self._kept),
            loss=loss.name,
            from_logits=loss.from_logits,
            batch_size=self._batch_size,
            optimizer=type(self.model.optimizer).__name__.lower(),
            loss_options=options,
            output=self._output,
            class_weights=self._class_weights,
            model=_NETWORK if needs_network_file(self.model) else None,
        )
