"""Inner products of gradients that are kept as factors, for one layer at one checkpoint.

With error signals e_p and activations h_p at positions p (one, unless the layer is applied at
many, as to the tokens of a text) the gradient of a layer is G = Σ_p e_p h_pᵀ, and of its bias
Σ_p e_p, so that

    ⟨G, G'⟩ = Σ_p Σ_q (e_p·e'_q)(h_p·h'_q + 1)

where the 1 belongs to the bias. It is computed in this form, or from the materialised gradients,
whichever takes fewer multiplications.
"""

import math
from collections.abc import Iterator

import numpy as np

from tracin_transforms.core.factors import LayerFactors

# What is gathered or materialised at a time.
_BUDGET_BYTES = 64 * 2**20


def all_products(layer: LayerFactors, other: LayerFactors) -> np.ndarray:
    """Returns ⟨G_i, G'_j⟩ of every example i with every example j.

    Args:
        layer: Factors of n examples.
        other: Factors of q examples, of the same layer.

    Returns:
        Shape [n, q], float32.
    """
    if layer.positions == other.positions == 1:
        products = _flat(layer.activations) @ _flat(other.activations).T
        if layer.has_bias:
            products += 1
        products *= _flat(layer.error_signals) @ _flat(other.error_signals).T
        return products
    if _gram_is_cheaper(layer, other):
        return _gram_products(layer, other)
    gradients = materialised(other)
    rows = _rows_that_fit(gradients[0].nbytes)
    found = [materialised(layer.rows(piece)) @ gradients.T for piece in _pieces(len(layer), rows)]
    return np.concatenate(found)


def pair_products(
    layer: LayerFactors, other: LayerFactors, rows: np.ndarray, other_rows: np.ndarray
) -> np.ndarray:
    """Returns ⟨G_i, G'_j⟩ of chosen pairs (i, j), shape [m], float64.

    A pair's value depends on its own factors alone, not on those around it.

    Args:
        layer: Factors of n examples.
        other: Factors of q examples, of the same layer.
        rows: i of each pair, shape [m].
        other_rows: j of each pair, shape [m].
    """
    numbers = layer.numbers_per_example + other.numbers_per_example
    numbers += 2 * layer.positions * other.positions
    found = [np.empty(0)]
    for piece in _pieces(len(rows), _rows_that_fit(8 * numbers)):
        e, f = (
            part.error_signals[at[piece]].astype(np.float64)
            for part, at in ((layer, rows), (other, other_rows))
        )
        h, g = (
            part.activations[at[piece]].astype(np.float64)
            for part, at in ((layer, rows), (other, other_rows))
        )
        found.append(_one_by_one(e, f, h, g, layer.has_bias))
    return np.concatenate(found)


def squared_norms(layer: LayerFactors) -> np.ndarray:
    """Returns ‖G_i‖² of each example, shape [n], float64."""
    every = np.arange(len(layer))
    return pair_products(layer, layer, every, every)


def absolute_norms(layer: LayerFactors) -> np.ndarray:
    """Returns Σ_p ‖e_p‖ ‖h_p‖, at least ‖G_i‖, for each example, shape [n], float64.

    It bounds what is added up in a product, as ‖G‖ does not where positions cancel each other.
    """
    e = np.sqrt(np.square(layer.error_signals, dtype=np.float64).sum(axis=-1))
    h = np.sqrt(np.square(layer.activations, dtype=np.float64).sum(axis=-1) + layer.has_bias)
    return (e * h).sum(axis=1) if e.ndim == 2 else e * h


def materialised(layer: LayerFactors) -> np.ndarray:
    """Returns the gradients themselves, kernel and then bias, shape [n, C·d (+ C)], float32."""
    e, h = _by_position(layer.error_signals), _by_position(layer.activations)
    kernels = np.matmul(e.transpose(0, 2, 1), h).reshape(len(layer), -1)
    return np.hstack([kernels, e.sum(axis=1)]) if layer.has_bias else kernels


def _one_by_one(
    e: np.ndarray, f: np.ndarray, h: np.ndarray, g: np.ndarray, has_bias: bool
) -> np.ndarray:
    if e.ndim == f.ndim == 2:
        products = np.einsum("ij,ij->i", h, g) + has_bias
        return products * np.einsum("ij,ij->i", e, f)
    e, f, h, g = (_by_position(part) for part in (e, f, h, g))
    signals, products = e @ f.transpose(0, 2, 1), h @ g.transpose(0, 2, 1)
    return (signals * (products + has_bias)).sum(axis=(1, 2))


def _gram_products(layer: LayerFactors, other: LayerFactors) -> np.ndarray:
    """All pairs of positions first, their sums then."""
    f, g = (_by_position(part) for part in (other.error_signals, other.activations))
    f, g = (part.reshape(-1, part.shape[-1]).T for part in (f, g))
    rows = _rows_that_fit(2 * 4 * layer.positions * f.shape[1])
    found = []
    for piece in _pieces(len(layer), rows):
        e, h = (_by_position(a[piece]) for a in (layer.error_signals, layer.activations))
        products = h.reshape(-1, h.shape[-1]) @ g
        if layer.has_bias:
            products += 1
        products *= e.reshape(-1, e.shape[-1]) @ f
        shape = (len(e), layer.positions, len(other), other.positions)
        found.append(products.reshape(shape).sum(axis=(1, 3)))
    return np.concatenate(found)


def _gram_is_cheaper(layer: LayerFactors, other: LayerFactors) -> bool:
    """Compares the multiplications of the two orders."""
    n, q, p, r = len(layer), len(other), layer.positions, other.positions
    outputs, width = layer.error_signals.shape[-1], layer.activations.shape[-1]
    gram = n * p * q * r * (outputs + width)
    return gram < (n * p + q * r + n * q) * outputs * (width + layer.has_bias)


def _flat(array: np.ndarray) -> np.ndarray:
    return array.reshape(len(array), array.shape[-1])


def _by_position(array: np.ndarray) -> np.ndarray:
    return array[:, None] if array.ndim == 2 else array


def _rows_that_fit(bytes_per_row: int) -> int:
    return max(1, _BUDGET_BYTES // max(1, bytes_per_row))


def _pieces(n: int, size: int) -> Iterator[slice]:
    for i in range(math.ceil(n / size)):
        yield slice(i * size, (i + 1) * size)
