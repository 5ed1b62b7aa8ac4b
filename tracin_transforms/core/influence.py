"""Influence of training examples on query examples, from gradient factors.

All functions sum over the layers of a block. `weights` are those of the K checkpoints, η_k in
TracInCP. The axis order is always [training example, query example].
"""

from collections.abc import Iterable, Iterator

import numpy as np

from tracin_transforms.core.errors import InputError
from tracin_transforms.core.factors import FactorBlock, GradientFactors, LayerFactors
from tracin_transforms.core.products import (
    absolute_norms,
    all_products,
    pair_products,
    squared_norms,
)

# Gradients of less than this norm are magnified, by powers of two so that with the weights float32
# has room for them.
_TINY = 2.0**-40
_LARGEST_EXPONENT = 120
# And that float64 has room for.
_LARGEST_SCALE = 1000


def influence(block: FactorBlock, queries: FactorBlock, weights: np.ndarray) -> np.ndarray:
    r"""Returns the influence of each training example on each query example.

    ``TracInCP(z, z') = Σ_k η_k ∇ℓ(w_k, z)·∇ℓ(w_k, z')``, see `products`. The product is
    taken for each checkpoint before the sum: multiplying sums over checkpoints is a different,
    wrong number.

    Args:
        block: n training examples at K checkpoints.
        queries: q query examples at the same checkpoints, with the same layers.
        weights: η_k, shape [K].

    Returns:
        Shape [n, q], float32. Positive: the training example lowered the query's loss.

    Raises:
        InputError: A product is beyond float32; the message names the example.
        ValueError: The checkpoints, layers or weights do not fit each other.

    Reference:
        Pruthi et al. (2020), section 3.2 (TracInCP) and section 4.1 (last layer).
    """
    _check_weights(block, weights)
    weighted = queries.scaled(np.tile(weights, (len(queries), 1)))
    total = inner_products(block.gradients, weighted.gradients)
    check_in_range(block, total)
    return total


def inner_products(
    gradients: Iterable[GradientFactors], queries: Iterable[GradientFactors]
) -> np.ndarray:
    """Returns Σ_k ⟨∇ℓ(w_k, z), ∇ℓ(w_k, z')⟩, each checkpoint counted alike.

    Args:
        gradients: Of n training examples at K checkpoints, one after the other.
        queries: Of q query examples at the same checkpoints, with the same layers.

    Returns:
        Shape [n, q], float32; what is beyond its range is infinite or NaN.

    Raises:
        InputError: The layers do not fit each other.
        ValueError: The checkpoints do not.
    """
    total = None
    # What is beyond float32 is for the caller to find.
    with np.errstate(over="ignore", invalid="ignore"):
        for gradient, query_gradient in zip(gradients, queries, strict=True):
            _check_same_form(gradient, query_gradient)
            for layer, other in zip(gradient.layers, query_gradient.layers, strict=True):
                products = all_products(layer, other)
                total = products if total is None else np.add(total, products, out=total)
    assert total is not None
    return total


def paired_products(
    gradients: Iterable[GradientFactors],
    queries: Iterable[GradientFactors],
    rows: np.ndarray,
    columns: np.ndarray,
) -> np.ndarray:
    """Returns of chosen pairs what `inner_products` returns of all.

    Args:
        gradients: Of n training examples at K checkpoints, one after the other.
        queries: Of q query examples at the same checkpoints, with the same layers.
        rows: The training example of each pair, shape [m].
        columns: The query of each pair, shape [m].

    Returns:
        Shape [m], float32; what is beyond its range is infinite or NaN.

    Raises:
        InputError: The layers do not fit each other.
        ValueError: The checkpoints do not.
    """
    total = np.zeros(len(rows), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for gradient, query_gradient in zip(gradients, queries, strict=True):
            _check_same_form(gradient, query_gradient)
            for layer, other in zip(gradient.layers, query_gradient.layers, strict=True):
                total += pair_products(layer, other, rows, columns, np.float32)
    return total


def check_in_range(block: FactorBlock, scores: np.ndarray) -> None:
    """Raises InputError, naming an example, if scores are not finite.

    Args:
        block: n training examples.
        scores: Of each of them, shape [n, q].
    """
    finite = np.isfinite(scores).all(axis=1)
    if not finite.all():
        example = str(block.example_ids[np.flatnonzero(~finite)[0]])
        raise InputError(
            f"example {example!r} has an influence beyond the range of float32: check the scale "
            "of the model's activations"
        )


def pair_influence(
    block: FactorBlock,
    queries: FactorBlock,
    weights: np.ndarray,
    rows: np.ndarray,
    columns: np.ndarray,
) -> np.ndarray:
    """Returns the influence of chosen pairs, each checkpoint's and layer's part apart, in float64.

    A pair's value depends on its own factors alone, not on the block that it was scored in.

    Args:
        block: Training examples at K checkpoints.
        queries: Query examples at the same checkpoints.
        weights: η_k, shape [K].
        rows: Row of the block of each pair, shape [m].
        columns: Row of the queries of each pair, shape [m].

    Returns:
        η_k ∇ℓ(w_k, z)·∇ℓ(w_k, z') for each of L layers, shape [m, K, L], float64. The sum over
        axes 1 and 2 is the influence.
    """
    _check_weights(block, weights)
    parts = np.empty((len(rows), len(weights), len(block.layer_names)))
    for gradient, query_gradient in zip(block.gradients, queries.gradients, strict=True):
        _check_same_form(gradient, query_gradient)
    for k, i, layer, query_layer in _layer_pairs(block, queries):
        parts[:, k, i] = weights[k] * pair_products(layer, query_layer, rows, columns)
    return parts


def self_influence(block: FactorBlock, weights: np.ndarray) -> np.ndarray:
    """Returns the influence of each example on itself, each checkpoint's and layer's part apart.

    ``η_k ‖∇ℓ(w_k, z)‖² = η_k ‖e‖²(‖h‖² + 1)``. Large values point at mislabelled and odd examples.

    Args:
        block: n examples at K checkpoints.
        weights: η_k, shape [K].

    Returns:
        Shape [n, K, L], float64, >= 0. The sum over axes 1 and 2 is the self-influence.

    Reference:
        Pruthi et al. (2020), section 5 (self-influence for mislabelled examples).
    """
    return squared_gradient_norms(block) * weights[:, None]


def squared_gradient_norms(block: FactorBlock) -> np.ndarray:
    """Returns ‖∇ℓ(w_k, z)‖² of each of the block's L layers, shape [n, K, L], float64."""
    norms = np.empty((len(block), len(block.gradients), len(block.layer_names)))
    for k, i, layer, _ in _layer_pairs(block, block):
        norms[:, k, i] = squared_norms(layer)
    return norms


def rounding_bound(
    largest: np.ndarray, query_norms: np.ndarray, weights: np.ndarray, numbers: int
) -> np.ndarray:
    """Returns how far `influence` may lie from the exact value of the float32 factors.

    A float32 product of vectors of length m is off by about √m·u times the product of their
    norms, u = 2⁻²⁴; the factor 8 covers both products, the sums and the tail. The norms of the
    training examples enter by their maximum.

    Args:
        largest: The largest `absolute_gradient_norms` of training examples at each checkpoint,
            shape [K].
        query_norms: What `absolute_gradient_norms` gives for q query examples, shape [q, K].
        weights: η_k, shape [K].
        numbers: How many numbers the factors of one example at one checkpoint are.

    Returns:
        Shape [q], float64. It holds for rounding errors that are random, as those of long sums
        are, all but certainly; not for the worst that could be constructed.

    Reference:
        Higham & Mary (2019), A New Approach to Probabilistic Rounding Error Analysis.
    """
    return 8 * np.sqrt(numbers) * 2.0**-24 * (query_norms @ (np.abs(weights) * largest))


def magnification(query_norms: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns by what to multiply each query's gradient so that products do not underflow.

    Args:
        query_norms: What `absolute_gradient_norms` gives for q query examples, shape [q, K].
        weights: η_k, shape [K].

    Returns:
        Powers of two, shape [q], float64; 1 but for gradients that are tiny at every checkpoint,
        their weights included.
    """
    sizes = np.abs(weights)
    norms = (query_norms * sizes).max(axis=1, initial=0.0)
    is_tiny = (norms > 0) & (norms < _TINY)
    exponents = np.floor(np.log2(norms, where=is_tiny, out=np.zeros(len(norms))))
    largest = max(sizes.max(initial=0.0), 2.0**-_LARGEST_SCALE)
    most = min(_LARGEST_EXPONENT - np.ceil(np.log2(largest)), _LARGEST_SCALE)
    return np.exp2(np.minimum(-exponents, most))


def with_gradient(query_norms: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns which queries have a gradient other than 0; on the others nothing has influence.

    Args:
        query_norms: What `absolute_gradient_norms` gives for q query examples, shape [q, K].
        weights: η_k, shape [K].

    Returns:
        Shape [q], bool.
    """
    found: np.ndarray = (query_norms * (weights != 0)).any(axis=1)
    return found


def absolute_gradient_norms(block: FactorBlock) -> np.ndarray:
    """Returns what bounds the terms of a product of gradients, shape [n, K], float64."""
    squares = np.zeros((len(block), len(block.gradients)))
    for k, _, layer, _ in _layer_pairs(block, block):
        squares[:, k] += absolute_norms(layer) ** 2
    return np.sqrt(squares)


def _layer_pairs(
    block: FactorBlock, queries: FactorBlock
) -> Iterator[tuple[int, int, LayerFactors, LayerFactors]]:
    """Yields checkpoint, layer, and the two blocks' factors for them."""
    for k, (gradient, query_gradient) in enumerate(
        zip(block.gradients, queries.gradients, strict=True)
    ):
        pairs = zip(gradient.layers, query_gradient.layers, strict=True)
        for i, (layer, query_layer) in enumerate(pairs):
            yield k, i, layer, query_layer


def _check_weights(block: FactorBlock, weights: np.ndarray) -> None:
    if np.shape(weights) != (len(block.gradients),):
        raise ValueError(
            f"weights have shape {np.shape(weights)}, expected one for each of the "
            f"{len(block.gradients)} checkpoints"
        )


def _check_same_form(gradient: GradientFactors, queries: GradientFactors) -> None:
    if gradient.checkpoint_id != queries.checkpoint_id:
        raise ValueError(
            f"training and query examples have factors at different checkpoints: "
            f"{gradient.checkpoint_id!r} vs {queries.checkpoint_id!r}"
        )
    layers, query_layers = (
        [(layer.name, layer.has_bias, layer.groups, layer.is_one_hot) for layer in side.layers]
        for side in (gradient, queries)
    )
    if layers != query_layers:
        raise InputError(
            "the gradient factors of training and query examples have different forms, "
            f"{layers} and {query_layers} (layer, bias, groups, one-hot): expected the same "
            "layers, and inputs of the same shape where a model does not declare it"
        )
