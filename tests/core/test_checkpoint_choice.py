import numpy as np
import pytest

from tracin_transforms.core.checkpoint_choice import propose, summarise
from tracin_transforms.core.checkpoints import Checkpoint, CheckpointSeries
from tracin_transforms.core.errors import InputError

LOSSES = [2.0, 1.9, 0.9, 0.5, 0.55, 0.35]
VALIDATION = [2.0, 1.5, 0.8, 0.7, 0.9, 1.2]


def _series(losses=LOSSES, validation=VALIDATION, steps=(10, 20, 30, 40, 50, 60)):
    return CheckpointSeries(
        tuple(
            Checkpoint(f"c{i}", f"c{i}.keras", 0.1, step, loss=loss, validation_loss=check)
            for i, (step, loss, check) in enumerate(zip(steps, losses, validation, strict=True))
        ),
        "mean_squared_error",
        None,
    )


def _chosen(number, rule, series=None):
    series = series or _series()
    summaries = summarise(series, np.ones(len(series.checkpoints)))
    return [checkpoint.id for checkpoint in propose(summaries, number, rule)]


@pytest.mark.parametrize(
    ("number", "rule", "expected"),
    [
        (2, "loss-drop", ["c2", "c3"]),
        (3, "loss-drop", ["c2", "c3", "c5"]),
        (6, "loss-drop", ["c0", "c1", "c2", "c3", "c4", "c5"]),
        (1, "validation-loss", ["c3"]),
        (3, "validation-loss", ["c2", "c3", "c4"]),
        (3, "evenly", ["c1", "c3", "c5"]),
        (2, "evenly", ["c2", "c5"]),
        (1, "evenly", ["c5"]),
        (9, "evenly", ["c0", "c1", "c2", "c3", "c4", "c5"]),
    ],
)
def test_proposals(number, rule, expected):
    assert _chosen(number, rule) == expected


def test_what_recovers_from_a_bad_step_has_learned_nothing_new():
    series = _series(losses=[2.0, 1.9, 0.9, 0.5, 1.5, 0.45])
    assert [s.loss_drop for s in summarise(series, np.ones(6))][4:] == pytest.approx([-1.0, 0.05])
    assert _chosen(2, "loss-drop", series) == ["c2", "c3"]


def test_evenly_goes_by_steps():
    series = _series(steps=(1, 2, 3, 4, 50, 100))
    assert _chosen(2, "evenly", series) == ["c4", "c5"]


def test_what_is_not_known_is_said():
    with pytest.raises(InputError, match="checkpoint 'c0' .*has no validation loss"):
        _chosen(2, "validation-loss", _series(validation=[None] * 6))
    with pytest.raises(InputError, match="checkpoint 'c3' or one before it has no loss"):
        _chosen(2, "loss-drop", _series(losses=[2.0, 1.0, 0.5, None, 0.2, 0.1]))
    with pytest.raises(InputError, match="rule 'luck': expected one of loss-drop"):
        _chosen(2, "luck")
    with pytest.raises(InputError, match="0 checkpoints: expected"):
        _chosen(0, "evenly")


def test_summaries_of_a_sample():
    losses = np.array([[1, 0.5, 0.25, 0.2, 0.1, 0.1], [3, 1.5, 0.75, 0.6, 0.3, 0.1]])
    norms = np.array([[4, 1, 1, 1, 1, 0], [16, 9, 1, 1, 1, 0]])
    weights = np.array([1, 2, 1, 1, 1, 1])
    summaries = summarise(_series(), weights, losses, norms)
    assert [s.loss for s in summaries] == pytest.approx([2, 1, 0.5, 0.4, 0.2, 0.1])
    assert [s.loss_drop for s in summaries] == pytest.approx([None, 1, 0.5, 0.1, 0.2, 0.1])
    assert [s.gradient_norm for s in summaries] == pytest.approx([3, 2, 1, 1, 1, 0])
    total = 20 + 2 * 10 + 2 + 2 + 2
    expected = [20 / total, 20 / total, 2 / total, 2 / total, 2 / total, 0]
    assert [s.influence_share for s in summaries] == pytest.approx(expected)


def test_a_sample_without_any_gradient():
    summaries = summarise(_series(), np.ones(6), np.zeros((2, 6)), np.zeros((2, 6)))
    assert {s.influence_share for s in summaries} == {0.0}
