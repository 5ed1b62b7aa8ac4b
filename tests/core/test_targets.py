import numpy as np
import pytest

from tracin_transforms.core.errors import InputError
from tracin_transforms.core.targets import (
    ExampleError,
    readable_predictions,
    readable_targets,
    target_rows,
    weights_of_classes,
)


def test_targets_become_one_number_for_each_output():
    one_hot = np.eye(4)[[0, 3, 2]]
    for indices in (np.array([0, 3, 2]), np.array([[0], [3], [2]])):
        np.testing.assert_array_equal(target_rows("index", indices, (3, 4)), one_hot)
    np.testing.assert_array_equal(target_rows("distribution", one_hot, (3, 4)), one_hot)
    values = np.array([0.5, 1, 2])
    np.testing.assert_array_equal(target_rows("value", values, (3, 1)), values[:, None])


def test_labels_and_predictions_for_a_reader():
    rows = np.eye(4)[[0, 3]]
    assert readable_targets("index", rows).tolist() == [0, 3]
    assert readable_predictions("distribution", -rows).tolist() == [1, 0]
    binary = np.array([[1.0], [0.0]])
    assert readable_targets("binary", binary).dtype == np.int32
    assert readable_targets("binary", binary).tolist() == [1, 0]
    assert readable_targets("binary", np.array([[0.5], [1]])).dtype == np.float32
    assert readable_predictions("binary", np.array([[-1.0, 2.0]])).tolist() == [[0, 1]]
    assert readable_targets("value", np.array([[1.5], [2]])).tolist() == [1.5, 2]
    assert readable_predictions("value", np.array([[1.0, 2]])).dtype == np.float32


@pytest.mark.parametrize(
    ("kind", "targets", "message"),
    [
        ("index", [0, 3, 4], r"label 4 is out of range.*expected 0 to 3"),
        ("index", [-1, 3, 0], "label -1"),
        ("distribution", [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 1]], ".* is not one-hot"),
        ("distribution", [[1, 0, 0, 0], [2, -1, 0, 0], [0, 0, 0, 1]], ".* is not one-hot"),
        ("binary", [[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 3, 0]], ".* is not 0 or 1"),
        ("value", [[0, 0, 1, 0], [0, np.nan, 0, 0], [0, 0, 3, 0]], ".* is not finite"),
    ],
)
def test_bad_targets_are_named(kind, targets, message):
    with pytest.raises(ExampleError, match=message):
        target_rows(kind, np.array(targets), (3, 4))


def test_targets_of_another_kind_are_refused():
    with pytest.raises(InputError, match="one-hot labels need categorical_crossentropy"):
        target_rows("index", np.eye(4)[:3], (3, 4))
    with pytest.raises(InputError, match="integer labels need sparse_categorical_crossentropy"):
        target_rows("distribution", np.array([0, 1, 2]), (3, 4))
    with pytest.raises(InputError, match=r"shape \(3, 2\), expected \(3, 4\)"):
        target_rows("value", np.zeros((3, 2)), (3, 4))


def test_a_class_may_be_an_index_or_a_row():
    one_hot = np.eye(4)[[0, 3, 2]]
    np.testing.assert_array_equal(target_rows("class", np.array([0, 3, 2]), (3, 4)), one_hot)
    np.testing.assert_array_equal(target_rows("class", one_hot, (3, 4)), one_hot)
    assert readable_targets("class", one_hot).tolist() == [0, 3, 2]


def test_weights_of_classes():
    one_hot = np.eye(3)[[0, 2, 1, 2]]
    assert weights_of_classes("index", one_hot, {2: 5.0, 0: 0.5}).tolist() == [0.5, 5, 1, 5]
    assert weights_of_classes("index", one_hot, {}).tolist() == [1, 1, 1, 1]
    binary = np.array([[1.0], [0.0]])
    assert weights_of_classes("binary", binary, {1: 3.0}).tolist() == [3, 1]
    for kind, rows in (("value", one_hot), ("binary", one_hot), ("index", one_hot[:, None])):
        with pytest.raises(InputError, match="class weights need one class index"):
            weights_of_classes(kind, rows, {1: 2.0})
