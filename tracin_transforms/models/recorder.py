"""A Keras callback that records the checkpoints of a training run as TracIn needs them."""

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import keras

from tracin_transforms.core.checkpoints import Checkpoint, CheckpointSeries
from tracin_transforms.core.errors import InputError
from tracin_transforms.core.losses import check_loss
from tracin_transforms.storage.checkpoint_series import FILE_NAME, write_checkpoint_series
from tracin_transforms.storage.files import local_path, written_atomically


class CheckpointRecorder(keras.callbacks.Callback):
    """Writes checkpoints and ``checkpoints.json`` while a model trains.

    Loss, optimizer, batch size, and for each checkpoint the learning rate of its last step, are
    taken from the model. After every checkpoint the directory is complete and can be used::

        model.fit(x, y, epochs=12, callbacks=[CheckpointRecorder("run", every=2)])

    Args:
        directory: The run's directory; made if it does not exist.
        every: Record after every so many epochs.
        epochs: Record after these epochs instead, counted from 1.

    Raises:
        InputError: Both or neither of `every` and `epochs` make sense; the directory already
            holds a run; the model's loss is not supported (when training begins).
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
        self._loss: tuple[str, bool] = ("", False)
        self._learning_rate = math.nan
        self._batch_size: int | None = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Validates the model's loss and makes the directory."""
        if (self._directory / FILE_NAME).exists() and not self._checkpoints:
            raise InputError(
                f"{str(self._directory)!r} already holds a training run: choose another directory"
            )
        self._loss = _training_loss(self.model)
        self._directory.mkdir(parents=True, exist_ok=True)

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Notes the learning rate of the epoch's last step, before the step.

        Afterwards a schedule already gives the next step's, and another callback may have changed
        it at the epoch's end.
        """
        steps = self.params.get("steps")
        if steps is None or batch + 1 >= steps:
            self._learning_rate = float(self.model.optimizer.learning_rate)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Notes the batch size."""
        if self._batch_size is None:
            self._batch_size = self._examples_so_far() // (batch + 1) or None

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Writes the checkpoint, if one is due, and then ``checkpoints.json``."""
        finished = epoch + 1
        due = finished % self._every == 0 if self._epochs is None else finished in self._epochs
        if not due:
            return
        path = self._directory / f"epoch-{finished:03d}.keras"
        with written_atomically(path) as temporary:
            self.model.save(temporary, include_optimizer=False)
        loss = (logs or {}).get("loss")
        self._checkpoints.append(
            Checkpoint(
                id=path.stem,
                path=path.name,
                learning_rate=self._learning_rate,
                step=int(self.model.optimizer.iterations),
                epoch=finished,
                loss=None if loss is None else float(loss),
            )
        )
        write_checkpoint_series(
            self._directory,
            CheckpointSeries(
                checkpoints=tuple(self._checkpoints),
                loss=self._loss[0],
                from_logits=self._loss[1],
                batch_size=self._batch_size,
                optimizer=type(self.model.optimizer).__name__.lower(),
            ),
        )

    def _examples_so_far(self) -> int:
        """Returns how many examples the epoch's loss was averaged over, which Keras counts."""
        trackers = [m for m in self.model.metrics if m.name == "loss" and hasattr(m, "count")]
        return int(trackers[0].count) if trackers else 0


def _training_loss(model: keras.Model) -> tuple[str, bool]:
    """Returns the Keras name of a compiled model's loss and whether it takes logits."""
    loss = keras.losses.get(model.loss) if not isinstance(model.loss, list | dict) else None
    if loss is None:
        raise InputError(f"the model's loss is {model.loss!r}: expected one loss")
    if not isinstance(loss, keras.losses.Loss):
        name = loss.__name__
        check_loss(name)
        return name, False
    name = "".join(f"_{c.lower()}" if c.isupper() else c for c in type(loss).__name__).lstrip("_")
    check_loss(name)
    config = loss.get_config()
    if config.get("label_smoothing"):
        raise InputError(f"label_smoothing is {config['label_smoothing']}: only 0 is supported")
    if config.get("ignore_class") is not None:
        raise InputError(f"ignore_class is {config['ignore_class']}: only None is supported")
    return name, bool(config["from_logits"])
