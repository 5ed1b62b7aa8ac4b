"""How well a ranking finds the examples that are known to be wrong."""

import numpy as np


def recovery_curve(found_in_order: np.ndarray) -> np.ndarray:
    """Returns the share found after inspecting the first 0, 1, ..., n examples of a ranking.

    Args:
        found_in_order: Whether each example, in rank order, is one of those sought, shape [n],
            bool.

    Returns:
        Shape [n + 1], float64, rising from 0 to 1.

    Raises:
        ValueError: None is sought.

    Reference:
        Pruthi et al. (2020), figure 1 (fraction of mislabelled found over data inspected).
    """
    found = np.concatenate([[0], np.cumsum(found_in_order)])
    if found[-1] == 0:
        raise ValueError("expected at least one example to be sought")
    return found / found[-1]


def inspected_count(share: float, n: int) -> int:
    """Returns how many examples the first `share` (0 to 1) of a ranking of n are, rounded up."""
    return int(np.ceil(share * n))


def share_found(found_in_order: np.ndarray, inspected: float) -> float:
    """Returns the share, 0 to 1, of those sought that the first part of a ranking holds.

    Args:
        found_in_order: As for `recovery_curve`.
        inspected: The part of the ranking, 0 to 1, see `inspected_count`.

    Raises:
        ValueError: None is sought.
    """
    return float(recovery_curve(found_in_order)[inspected_count(inspected, len(found_in_order))])


def average_precision(found_in_order: np.ndarray) -> float:
    """Returns the mean, over those sought, of the precision at their rank, in (0, 1]."""
    ranks = np.flatnonzero(found_in_order) + 1
    if len(ranks) == 0:
        raise ValueError("expected at least one example to be sought")
    return float(np.mean(np.arange(1, len(ranks) + 1) / ranks))
