"""A Keras callback that records the checkpoints of a training run as TracIn needs them."""

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import keras

from tracin_transforms.core.checkpoints import Checkpoint, CheckpointSeries
from tracin_transforms.core.errors import InputError
from tracin_transforms.models.factor_function import FactorFunction
from tracin_transforms.models.training_loss import TrainingLoss, loss_of_model
from tracin_transforms.storage.checkpoint_series import FILE_NAME, write_checkpoint_series
from tracin_transforms.storage.files import local_path, written_atomically


class CheckpointRecorder(keras.callbacks.Callback):
    """Writes checkpoints and ``checkpoints.json`` while a model trains.

    Loss, optimizer, batch size, and for each checkpoint the learning rate of its last step, are
    taken from the model. After every checkpoint the directory is complete and can be used::

        model.fit(x, y, epochs=12, callbacks=[CheckpointRecorder("run", every=2)])

    Where the same model is fitted again with the same recorder, the run goes on and its epochs are
    counted on. Influence is that of the plain loss: class and sample weights are not recorded.

    Args:
        directory: The run's directory; made if it does not exist.
        every: Record after every so many epochs.
        epochs: Record after these epochs instead, counted from 1.

    Raises:
        InputError: Both or neither of `every` and `epochs` make sense. When training begins: the
            directory already holds a run, the model or its loss is not supported, no epoch would
            be recorded, or this recorder has recorded another model.
    """

    def __init__(
        self, directory: str | Path, every: int = 1, epochs: Collection[int] | None = None
    ) -> None:
        super().__init__()
        if epochs is not None and (every != 1 or not epochs or min(epochs) < 1):
            raise InputError(
                f"every={every!r}, epochs={epochs!r}: expected either every or epochs, a list of "
                "epochs counted from 1"
            )
        if every < 1:
            raise InputError(f"every is {every!r}: expected a number of epochs, at least 1")
        self._directory = local_path(directory)
        self._every = every
        self._epochs = None if epochs is None else frozenset(epochs)
        self._checkpoints: list[Checkpoint] = []
        self._recorded: tuple[keras.Model, TrainingLoss] | None = None
        self._batch_size: int | None = None
        # The learning rate, and after how many of the optimizer's steps it was noted.
        self._noted = (math.nan, 0)
        # What the fits before this one did.
        self._epochs_before: int | None = 0
        self._steps_before = 0
        self._finished_epochs = 0
        self._finished_steps = 0

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Validates model, loss and epochs, and makes the directory."""
        if self._recorded is None and (self._directory / FILE_NAME).exists():
            raise InputError(
                f"{str(self._directory)!r} already holds a training run: choose another directory"
            )
        loss = loss_of_model(self.model)
        loss.check()
        if self._recorded not in (None, (self.model, loss)):
            raise InputError(
                "this CheckpointRecorder has recorded another model, or the same with another "
                "loss: use one recorder, with a directory of its own, for each training run"
            )
        FactorFunction(self.model, loss, f"model {self.model.name!r}").check()
        if not self._checkpoints and not any(map(self._is_due, range(1, self._last_epoch() + 1))):
            raise InputError(
                f"training ends after {self._last_epoch()} epochs, but the first checkpoint is due "
                f"after {self._every if self._epochs is None else min(self._epochs)}: none would "
                "be recorded"
            )
        self._recorded = (self.model, loss)
        self._directory.mkdir(parents=True, exist_ok=True)
        # A model that was compiled again counts its steps from 0, and `fit` its epochs.
        self._steps_before = max(0, self._finished_steps - int(self.model.optimizer.iterations))
        self._epochs_before = None

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Finds out, in a fit's first epoch, whether it counts on from the fit before."""
        if self._epochs_before is None:
            self._epochs_before = max(0, self._finished_epochs - epoch)

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Notes the learning rate of the epoch's last step, before the step.

        Afterwards a schedule already gives the next step's, and another callback may have changed
        it at the epoch's end.
        """
        steps = self.params.get("steps")
        if steps is None or batch + self.model.steps_per_execution >= steps:
            self._note_learning_rate()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Notes the batch size."""
        if self._batch_size is None:
            self._batch_size = self._examples_so_far() // (batch + 1) or None

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Writes the checkpoint, if one is due, and then ``checkpoints.json``."""
        steps = int(self.model.optimizer.iterations)
        if steps - self._noted[1] > self.model.steps_per_execution:
            # The data ended before the step that was to be the last.
            self._note_learning_rate()
        self._finished_epochs = epoch + 1 + (self._epochs_before or 0)
        self._finished_steps = steps + self._steps_before
        if self._is_due(self._finished_epochs):
            self._write_checkpoint((logs or {}).get("loss"))

    def _is_due(self, finished_epochs: int) -> bool:
        if self._epochs is None:
            return finished_epochs % self._every == 0
        return finished_epochs in self._epochs

    def _last_epoch(self) -> int:
        return int(self.params["epochs"])

    def _note_learning_rate(self) -> None:
        optimizer = self.model.optimizer
        self._noted = (float(optimizer.learning_rate), int(optimizer.iterations))

    def _write_checkpoint(self, mean_loss: float | None) -> None:
        path = self._directory / f"epoch-{self._finished_epochs:03d}.keras"
        with written_atomically(path) as temporary:
            self.model.save(temporary, include_optimizer=False)
        self._checkpoints.append(
            Checkpoint(
                id=path.stem,
                path=path.name,
                learning_rate=self._noted[0],
                step=self._finished_steps,
                epoch=self._finished_epochs,
                loss=None if mean_loss is None else float(mean_loss),
            )
        )
        loss = loss_of_model(self.model)
        write_checkpoint_series(
            self._directory,
            CheckpointSeries(
                checkpoints=tuple(self._checkpoints),
                loss=loss.name,
                from_logits=loss.from_logits,
                batch_size=self._batch_size,
                optimizer=type(self.model.optimizer).__name__.lower(),
                loss_options=loss.options,
            ),
        )

    def _examples_so_far(self) -> int:
        """Returns how many examples the epoch's loss was averaged over, which Keras counts."""
        trackers = [m for m in self.model.metrics if m.name == "loss" and hasattr(m, "count")]
        return int(trackers[0].count) if trackers else 0
