import numpy as np
import pytest

from tests.factories import WEIGHTS, materialised_gradients, random_block
from tracin_transforms.core.errors import InputError
from tracin_transforms.core.factors import FactorBlock, GradientFactors, LayerFactors
from tracin_transforms.core.influence import (
    absolute_gradient_norms,
    influence,
    pair_influence,
    rounding_bound,
    self_influence,
)


def _single(activation, error_signal, has_bias):
    layer = LayerFactors(
        "dense",
        np.array([activation], dtype=np.float32),
        np.array([error_signal], dtype=np.float32),
        has_bias,
    )
    return FactorBlock(
        shard="s",
        indices=np.arange(1),
        example_ids=np.array(["a"]),
        labels=np.zeros((1, 1), np.int32),
        predictions=np.zeros((1, 1), np.int32),
        losses=np.zeros((1, 1), np.float32),
        gradients=(GradientFactors("epoch-1", (layer,)),),
    )


@pytest.mark.parametrize(("has_bias", "expected"), [(True, 0.5 * 11 * 24), (False, 0.5 * 11 * 23)])
def test_hand_computed_case(has_bias, expected):
    z = _single([2, 3], [1, 2], has_bias)
    query = _single([4, 5], [3, 4], has_bias)
    weights = np.array([0.5])

    assert influence(z, query, weights).tolist() == [[expected]]
    own = 0.5 * 5 * (13 + has_bias)
    assert self_influence(z, weights).tolist() == [[[own]]]


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("positions", [1, 3])
def test_equals_materialised_gradients(has_bias, layers, positions):
    rng = np.random.default_rng(0)
    shape = {"has_bias": has_bias, "layers": layers, "positions": positions}
    block, queries = random_block(rng, 30, **shape), random_block(rng, 7, "q", **shape)
    gradients, query_gradients = materialised_gradients(block), materialised_gradients(queries)
    parts = np.einsum("k,klnp,klqp->nqkl", WEIGHTS, gradients, query_gradients)
    expected = parts.sum(axis=(2, 3))

    scores = influence(block, queries, WEIGHTS)
    assert np.abs(scores - expected).max() <= 1e-6 * np.abs(expected).max()
    largest = absolute_gradient_norms(block).max(axis=0)
    numbers = sum(layer.numbers_per_example for layer in block.gradients[0].layers)
    bound = rounding_bound(largest, absolute_gradient_norms(queries), WEIGHTS, numbers)
    assert (np.abs(scores - expected) <= bound).all()

    rows, columns = (index.ravel() for index in np.indices(expected.shape))
    pairs = pair_influence(block, queries, WEIGHTS, rows, columns)
    np.testing.assert_allclose(pairs, parts.reshape(-1, 3, layers), rtol=1e-12, atol=1e-12)

    own = self_influence(block, WEIGHTS)
    norms = np.einsum("k,klnp->nkl", WEIGHTS, gradients**2)
    np.testing.assert_allclose(own, norms, rtol=1e-12)


def test_self_influence_is_the_diagonal_and_not_negative():
    block = random_block(np.random.default_rng(3), 25)
    own = self_influence(block, WEIGHTS).sum(axis=(1, 2))

    np.testing.assert_allclose(np.diag(influence(block, block, WEIGHTS)), own, rtol=1e-5)
    assert (own >= 0).all()


def test_linear_in_the_weights_and_symmetric():
    block = random_block(np.random.default_rng(4), 12)
    scores = influence(block, block, WEIGHTS)

    np.testing.assert_allclose(scores, scores.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(influence(block, block, 2 * WEIGHTS), 2 * scores, rtol=1e-6)


def test_products_beyond_float32_are_named():
    with pytest.raises(InputError, match="example 'a' has an influence beyond the range"):
        influence(_single([1e30], [1], True), _single([1e30], [1], True), np.ones(1))


def test_blocks_that_do_not_fit_are_refused():
    rng = np.random.default_rng(5)
    block, queries = random_block(rng, 3), random_block(rng, 2, "q")
    with pytest.raises(ValueError, match="weights have shape"):
        influence(block, queries, np.ones(2))
    with pytest.raises(InputError, match="different forms"):
        influence(block, random_block(rng, 2, "q", has_bias=False), WEIGHTS)
