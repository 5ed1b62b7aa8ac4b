import numpy as np
import pytest

from tracin_transforms.core.cleaning import flip_to_most_likely_wrong
from tracin_transforms.core.evaluation import average_precision, recovery_curve, share_found

FOUND = np.array([True, False, True, False, False])


def test_hand_computed_case():
    np.testing.assert_array_equal(recovery_curve(FOUND), [0, 0.5, 0.5, 1, 1, 1])
    assert share_found(FOUND, 0.2) == 0.5
    assert share_found(FOUND, 0.5) == 1.0  # 2.5 of 5 examples: rounded up to 3
    assert average_precision(FOUND) == pytest.approx((1 / 1 + 2 / 3) / 2)


def test_average_precision_equals_scikit_learn():
    from sklearn.metrics import average_precision_score

    rng = np.random.default_rng(0)
    found = rng.random(200) < 0.1
    scores = -np.arange(200)
    assert average_precision(found) == pytest.approx(average_precision_score(found, scores))


def test_nothing_to_find_is_refused():
    for function in (recovery_curve, average_precision):
        with pytest.raises(ValueError, match="at least one"):
            function(np.zeros(3, dtype=bool))


def test_flips_go_to_the_highest_scoring_wrong_class():
    rng = np.random.default_rng(1)
    labels, scores = rng.integers(0, 5, 100), rng.random((100, 5))
    given, flipped = flip_to_most_likely_wrong(labels, scores, 0.1, np.random.default_rng(2))

    assert flipped.sum() == 10
    np.testing.assert_array_equal(given[~flipped], labels[~flipped])
    for row in np.flatnonzero(flipped):
        others = [c for c in range(5) if c != labels[row]]
        assert given[row] == max(others, key=lambda c: scores[row, c])
