"""Example ids: one unique string for each example, the same in every job."""

import numpy as np

from tracin_transforms.core.errors import InputError


def check_unique(example_ids: np.ndarray) -> None:
    """Raises InputError if an example id occurs twice, naming the first such id."""
    ids, counts = np.unique(example_ids, return_counts=True)
    repeated = np.flatnonzero(counts > 1)
    if len(repeated):
        raise InputError(
            f"example id {str(ids[repeated[0]])!r} occurs {counts[repeated[0]]} times "
            f"({len(repeated)} ids are repeated): expected every example id once"
        )
