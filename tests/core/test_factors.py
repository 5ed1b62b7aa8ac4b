import numpy as np
import pytest

from tests.factories import random_block, split
from tracin_transforms.core.errors import InputError
from tracin_transforms.core.factors import (
    FactorBlock,
    GradientFactors,
    LayerFactors,
    check_finite,
    concatenate_blocks,
)


def _layer(n=3, m=3):
    return LayerFactors("dense", np.zeros((n, 2), np.float32), np.zeros((m, 4), np.float32), True)


def test_arrays_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"examples and positions: \(3,\) vs \(2,\)"):
        _layer(3, 2)
    with pytest.raises(ValueError, match="float64, expected"):
        LayerFactors("dense", np.zeros((3, 2)), np.zeros((3, 4), np.float32), True)
    with pytest.raises(ValueError, match="at least one layer"):
        GradientFactors("epoch-1", ())
    with pytest.raises(ValueError, match=r"layers disagree .*\[2, 3\]"):
        GradientFactors("epoch-1", (_layer(), _layer(2, 2)))
    block = random_block(np.random.default_rng(0), 3)
    fields = {name: getattr(block, name) for name in block.__dataclass_fields__}
    for name, value, message in [
        ("labels", np.zeros(2, np.int32), "labels are 2, expected 3"),
        ("losses", np.zeros((3, 2), np.float32), "losses have shape"),
        ("example_ids", np.arange(3), "expected unicode"),
        ("gradients", (), "at least one checkpoint"),
        ("gradients", (GradientFactors("e", (_layer(2, 2),)),) * 3, "factors of 2 examples"),
        (
            "gradients",
            tuple(GradientFactors("e", (_layer(),) * (1 + k)) for k in range(3)),
            "factors of 2 layers, expected 1",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            FactorBlock(**{**fields, name: value})


@pytest.mark.parametrize(
    ("width", "has_bias", "groups"), [(2, False, 1), (1, True, 1), (1, False, 2)]
)
def test_one_hot_activations_have_one_index_no_bias_and_no_groups(width, has_bias, groups):
    indices, signals = np.zeros((3, width), np.int32), np.zeros((3, 4), np.float32)
    with pytest.raises(ValueError, match="one-hot activations .* expected one index each"):
        LayerFactors("embedding", indices, signals, has_bias, groups)


def test_concatenate_undoes_rows():
    block = random_block(np.random.default_rng(1), 11, layers=2)
    joined = concatenate_blocks(split(block, 4))

    np.testing.assert_array_equal(joined.example_ids, block.example_ids)
    np.testing.assert_array_equal(joined.losses, block.losses)
    for a, b in zip(joined.gradients, block.gradients, strict=True):
        for x, y in zip(a.layers, b.layers, strict=True):
            np.testing.assert_array_equal(x.activations, y.activations)
            np.testing.assert_array_equal(x.error_signals, y.error_signals)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("field", ["activations", "error_signals"])
def test_non_finite_numbers_name_example_and_checkpoint(value, field):
    block = random_block(np.random.default_rng(2), 5)
    assert check_finite(block) is block
    getattr(block.gradients[1].layers[0], field)[3, 1] = value
    with pytest.raises(InputError, match="example 'z00003' .* checkpoint 'epoch-1'"):
        check_finite(block)
