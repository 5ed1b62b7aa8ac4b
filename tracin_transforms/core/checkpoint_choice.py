"""Which checkpoints of a run to use: what each contributes, and proposals for a given number.

Pruthi et al. (2020) leave the choice open, and remark in their supplement that checkpoints with a
high reduction of the loss tell more than evenly spaced ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tracin_transforms.core.checkpoints import Checkpoint, CheckpointSeries
from tracin_transforms.core.errors import InputError

LOSS_DROP, VALIDATION_LOSS, EVENLY = "loss-drop", "validation-loss", "evenly"
RULES = (LOSS_DROP, VALIDATION_LOSS, EVENLY)


@dataclass(frozen=True)
class CheckpointSummary:
    """What is known of a checkpoint.

    Attributes:
        checkpoint: The checkpoint.
        loss: Mean training loss, of a sample where there is one, else as recorded; or None.
        loss_drop: How much lower it is than at any checkpoint before, below 0 if it is not: a
            network that recovers from a bad step has learned nothing new. None for the first.
        gradient_norm: Mean of ‖∇ℓ‖ over the sample, or None.
        influence_share: Part of the sample's self-influence that comes from this checkpoint, 0 to
            1, or None.
    """

    checkpoint: Checkpoint
    loss: float | None
    loss_drop: float | None
    gradient_norm: float | None = None
    influence_share: float | None = None


def summarise(
    series: CheckpointSeries,
    weights: np.ndarray,
    losses: np.ndarray | None = None,
    squared_norms: np.ndarray | None = None,
) -> list[CheckpointSummary]:
    """Returns what is known of each checkpoint of a run.

    Args:
        series: The run.
        weights: Of its K checkpoints, shape [K].
        losses: Of n examples at each, shape [n, K], or None.
        squared_norms: ‖∇ℓ‖² of the same, shape [n, K], or None.
    """
    if losses is None:
        means: Sequence[float | None] = [checkpoint.loss for checkpoint in series.checkpoints]
    else:
        means = losses.mean(axis=0, dtype=np.float64).tolist()
    norms: Sequence[float | None] = [None] * len(means)
    shares: Sequence[float | None] = [None] * len(means)
    if squared_norms is not None:
        norms = np.sqrt(squared_norms).mean(axis=0).tolist()
        parts = weights * squared_norms.sum(axis=0)
        shares = (parts / parts.sum()).tolist() if parts.any() else [0.0] * len(means)
    drops = [drop_below(means[:k], means[k]) for k in range(len(means))]
    return [
        CheckpointSummary(*columns)
        for columns in zip(series.checkpoints, means, drops, norms, shares, strict=True)
    ]


def propose(summaries: Sequence[CheckpointSummary], number: int, rule: str) -> list[Checkpoint]:
    """Returns `number` of the checkpoints, in order; all of them where there are no more.

    Args:
        summaries: What is known of each, in order.
        number: How many to choose.
        rule: ``loss-drop``: those with the largest drop of the loss below all before;
            ``validation-loss``: those with the lowest; ``evenly``: evenly spaced by step, from
            step 0 to the last checkpoint.

    Raises:
        InputError: What the rule needs is not known of a checkpoint; or there is no such rule.
    """
    if number < 1:
        raise InputError(f"{number} checkpoints: expected a number of at least 1")
    if rule == EVENLY:
        return [summaries[i].checkpoint for i in _evenly(summaries, number)]
    if rule == LOSS_DROP:
        # The first of a run has none before it; it comes last.
        first = -np.inf if summaries[0].loss_drop is None else summaries[0].loss_drop
        merits = [first, *(_known(s, "loss", s.loss_drop) for s in summaries[1:])]
    elif rule == VALIDATION_LOSS:
        merits = [-_known(s, "validation loss", s.checkpoint.validation_loss) for s in summaries]
    else:
        raise InputError(f"rule {rule!r}: expected one of {', '.join(RULES)}")
    best = np.argsort(-np.array(merits), kind="stable")[:number]
    return [summaries[i].checkpoint for i in sorted(best)]


def _evenly(summaries: Sequence[CheckpointSummary], number: int) -> list[int]:
    steps = np.array([summary.checkpoint.step for summary in summaries], dtype=float)
    chosen: list[int] = []
    # From the last, each time the nearest to the next place that is still free.
    for place in np.linspace(steps[-1], 0, number, endpoint=False):
        free = [i for i in range(len(steps)) if i not in chosen]
        if free:
            chosen.append(min(free, key=lambda i: (abs(steps[i] - place), -i)))
    return sorted(chosen)


def _known(summary: CheckpointSummary, what: str, value: float | None) -> float:
    if value is None:
        raise InputError(
            f"checkpoint {summary.checkpoint.id!r} or one before it has no {what}: record it, "
            "or choose by another rule"
        )
    return value


def drop_below(before: Sequence[float | None], loss: float | None) -> float | None:
    """Returns how far a loss lies below those before it, or None if one of them is not known."""
    known = [value for value in before if value is not None]
    if loss is None or not known or len(known) < len(before):
        return None
    return min(known) - loss
