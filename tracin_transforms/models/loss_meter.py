"""The mean training loss between two moments, from what Keras counts anyway."""

from typing import Any

import keras


class LossMeter:
    """Reads Keras's running sum of the loss, which starts anew with every epoch."""

    def __init__(self) -> None:
        # What was read in this epoch so far, and what is not reported yet: sum and count.
        self._seen = (0.0, 0.0)
        self._open = (0.0, 0.0)
        self._has_ended = False

    def examples(self, model: keras.Model) -> int:
        """Returns how many examples the epoch's loss was averaged over so far."""
        return int(_total_and_count(model)[1])

    def mean_since_last(self, model: keras.Model) -> float | None:
        """Returns the mean loss since this was asked last, or None if nothing was counted."""
        self._take(model)
        total, count = self._open
        self._open = (0.0, 0.0)
        return total / count if count else None

    def begin_epoch(self) -> None:
        """Keras starts anew."""
        self._seen, self._has_ended = (0.0, 0.0), False

    def end_epoch(self, model: keras.Model) -> None:
        """Keeps what is not reported yet; what Keras counts afterwards is validation."""
        if not self._has_ended:
            self._take(model)
            self._has_ended = True

    def _take(self, model: keras.Model) -> None:
        now = _total_and_count(model)
        self._open = (
            self._open[0] + now[0] - self._seen[0],
            self._open[1] + now[1] - self._seen[1],
        )
        self._seen = now


def _total_and_count(model: keras.Model) -> tuple[float, float]:
    trackers: list[Any] = [m for m in model.metrics if m.name == "loss" and hasattr(m, "count")]
    return (float(trackers[0].total), float(trackers[0].count)) if trackers else (0.0, 0.0)
