"""Wrong labels: made on purpose, to measure how well they are found."""

import numpy as np


def flip_to_most_likely_wrong(
    labels: np.ndarray, scores: np.ndarray, share: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Returns labels of which a random share is changed to the highest-scoring incorrect class.

    Args:
        labels: True class indices, shape [n], integer.
        scores: Logits or probabilities of a model, shape [n, C].
        share: Share of the labels to change, 0 to 1.
        rng: Chooses which.

    Returns:
        The changed labels, shape [n], and whether each was changed, shape [n], bool.

    Reference:
        Pruthi et al. (2020), section 5.1, the protocol of its mislabelling experiment.
    """
    flipped = np.zeros(len(labels), dtype=bool)
    flipped[rng.choice(len(labels), size=round(share * len(labels)), replace=False)] = True
    wrong_scores = np.array(scores, dtype=np.float64)
    wrong_scores[np.arange(len(labels)), labels] = -np.inf
    return np.where(flipped, wrong_scores.argmax(axis=1), labels).astype(labels.dtype), flipped
