"""When checkpoints are recorded while a model trains, and how many are kept."""

from collections.abc import Collection
from dataclasses import dataclass

from tracin_transforms.core.checkpoint_choice import EVENLY, RULES, VALIDATION_LOSS
from tracin_transforms.core.errors import InputError


@dataclass(frozen=True)
class Recording:
    """A plan for the checkpoints of a training run.

    Attributes:
        every: After every so many epochs.
        epochs: After these epochs instead, counted from 1.
        every_steps: After every so many optimizer steps instead.
        steps: After these steps instead, counted from 1.
        loss_drop: Of those, only where the loss is lower than at the last one recorded by this
            share of it, 0 to 1; None for all.
        keep: How many to keep; None for all.
        keep_by: Which ones, see `core.checkpoint_choice.propose`.
    """

    every: int | None = None
    epochs: Collection[int] | None = None
    every_steps: int | None = None
    steps: Collection[int] | None = None
    loss_drop: float | None = None
    keep: int | None = None
    keep_by: str = EVENLY

    def __post_init__(self) -> None:
        given = {n: getattr(self, n) for n in ("every", "epochs", "every_steps", "steps")}
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) != 1:
            raise InputError(
                f"{', '.join(f'{name}={value!r}' for name, value in given.items())}: expected one "
                "of every, epochs, every_steps and steps"
            )
        name, value = next(iter(given.items()))
        numbers = [value] if isinstance(value, int) else list(value)
        if not numbers or not all(isinstance(n, int) and n >= 1 for n in numbers):
            raise InputError(f"{name} is {value!r}: expected whole numbers, at least 1")
        if self.loss_drop is not None and not 0 < self.loss_drop < 1:
            raise InputError(f"loss_drop is {self.loss_drop!r}: expected a share between 0 and 1")
        if self.keep is not None and self.keep < 1:
            raise InputError(f"keep is {self.keep!r}: expected a number of at least 1")
        if self.keep_by not in RULES:
            raise InputError(f"keep_by is {self.keep_by!r}: expected one of {', '.join(RULES)}")
        if self.keep_by == VALIDATION_LOSS and self.by_step:
            raise InputError(
                "keep_by='validation-loss' with steps: the loss on validation data is known after "
                "epochs only; expected every or epochs"
            )

    @property
    def by_step(self) -> bool:
        """Whether steps are counted, not epochs."""
        return self.every_steps is not None or self.steps is not None

    def is_due(self, before: int, now: int) -> bool:
        """Returns whether a checkpoint is due among the epochs, or steps, after `before`.

        Args:
            before: Number of those finished when this was asked last.
            now: Number of those finished now.
        """
        interval = self.every_steps if self.by_step else self.every
        if interval is not None:
            return now // interval > before // interval
        return any(before < place <= now for place in (self.steps or self.epochs or ()))

    def first_due(self) -> int:
        """Returns the first epoch, or step, after which a checkpoint is due."""
        interval = self.every_steps if self.by_step else self.every
        return interval if interval is not None else min(self.steps or self.epochs or ())

    def has_dropped(self, last: float | None, now: float | None) -> bool:
        """Returns whether the loss is low enough to be recorded.

        Args:
            last: At the last recorded checkpoint; None if there is none.
            now: At this one.
        """
        if self.loss_drop is None or last is None or now is None:
            return True
        return now <= (1 - self.loss_drop) * last
