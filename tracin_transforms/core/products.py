"""Inner products of gradients that are kept as factors, for one layer at one checkpoint.

With error signals e_p and activations h_p at positions p (one, unless the layer is applied at
many, as to the tokens of a text) the gradient of a layer is G = Σ_p e_p h_pᵀ, and of its bias
Σ_p e_p, so that

    ⟨G, G'⟩ = Σ_p Σ_q (e_p·e'_q)(h_p·h'_q + 1)

where the 1 belongs to the bias. It is computed in this form, or from the gradients themselves,
some rows of G at a time, whichever takes fewer multiplications. Where activations are one-hot, as
those of an embedding, h_p·h'_q is 1 for equal indices and else 0. Groups are layers of their own,
whose products add up.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from tracin_transforms.core.buffers import Buffers
from tracin_transforms.core.factors import LayerFactors

# What is materialised at a time.
_BUDGET_BYTES = 64 * 2**20
# What is gathered at a time of chosen pairs: it is gone through several times, and stays near.
_PAIR_BYTES = 4 * 2**20
# Each thread that scores has some arrays in hand at a time.
_PRODUCTS = Buffers(12)


def all_products(layer: LayerFactors, other: LayerFactors) -> np.ndarray:
    """Returns ⟨G_i, G'_j⟩ of every example i with every example j.

    Args:
        layer: Factors of n examples.
        other: Factors of q examples, of the same layer.

    Returns:
        Shape [n, q], float32.
    """
    if layer.is_one_hot:
        return _products_by_index(layer, other)
    pairs = zip(layer.by_group(), other.by_group(), strict=True)
    first, *more = (_dense_products(a, b) for a, b in pairs)
    for products in more:
        first += products
    return first


def pair_products(
    layer: LayerFactors,
    other: LayerFactors,
    rows: np.ndarray,
    other_rows: np.ndarray,
    dtype: type[np.floating[Any]] = np.float64,
) -> np.ndarray:
    """Returns ⟨G_i, G'_j⟩ of chosen pairs (i, j).

    A pair's value depends on its own factors alone, not on those around it.

    Args:
        layer: Factors of n examples.
        other: Factors of q examples, of the same layer.
        rows: i of each pair, shape [m].
        other_rows: j of each pair, shape [m].
        dtype: What is computed in, float64 or float32.

    Returns:
        Shape [m], of that dtype.
    """
    numbers = layer.numbers_per_example + other.numbers_per_example
    numbers += 2 * layer.positions * other.positions
    size = max(1, min(len(rows), _PAIR_BYTES // (np.dtype(dtype).itemsize * numbers)))
    sides = [
        (_Gathered(array, size, np.dtype(dtype)), places)
        for side, places in ((layer, rows), (other, other_rows))
        for array in (side.error_signals, side.activations)
    ]
    found = np.empty(len(rows), dtype)
    for piece in _pieces(len(rows), size):
        e, h, f, g = (
            _by_group(gathered.rows(places[piece]), layer.groups) for gathered, places in sides
        )
        parts = zip(e, h, f, g, strict=True)
        found[piece] = sum(_one_by_one(*part, layer.has_bias) for part in parts)
    return found


def squared_norms(layer: LayerFactors) -> np.ndarray:
    """Returns ‖G_i‖² of each example, shape [n], float64."""
    if layer.positions == 1:
        terms = sum(_squared_terms(group) for group in layer.by_group())
        return np.reshape(terms, len(layer))
    every = np.arange(len(layer))
    return pair_products(layer, layer, every, every)


def absolute_norms(layer: LayerFactors) -> np.ndarray:
    """Returns what bounds the terms of a product, at least ‖G_i‖, shape [n], float64.

    That is Σ_p ‖e_p‖ ‖h_p‖ over positions and groups; ‖G‖ does not bound what is added up where
    positions cancel each other.
    """
    bounds = np.zeros(len(layer))
    for group in layer.by_group():
        terms = np.sqrt(_squared_terms(group))
        bounds += terms.sum(axis=1) if terms.ndim == 2 else terms
    return bounds


def _squared_terms(layer: LayerFactors) -> np.ndarray:
    """Returns ‖e_p‖² (‖h_p‖² + 1) of each example and position, float64."""
    e = layer.error_signals.astype(np.float64)
    squares = np.vecdot(e, e)
    if layer.is_one_hot:
        return squares
    h = layer.activations.astype(np.float64)
    return squares * (np.vecdot(h, h) + layer.has_bias)


def gradient_sum(layer: LayerFactors, factors: np.ndarray, width: int) -> np.ndarray:
    """Returns Σ_i f_i G_i as one row: the rows of each group's matrix, then the biases.

    Args:
        layer: Factors of n examples.
        factors: f, shape [n].
        width: d, the width of the activations; as indices, they do not tell it.

    Returns:
        Shape [C·d/G (+ C)], float64.
    """
    matrices, biases = [], []
    for group in layer.by_group():
        e = group.error_signals.reshape(len(group), group.positions, -1) * factors[:, None, None]
        e = e.reshape(-1, e.shape[-1]).astype(np.float64)
        if group.is_one_hot:
            columns = np.zeros((width, e.shape[1]))
            np.add.at(columns, group.activations.ravel(), e)
            matrices.append(columns.T)
        else:
            matrices.append(e.T @ group.activations.reshape(len(e), -1))
        biases.append(e.sum(axis=0) if group.has_bias else e[:0].ravel())
    return np.concatenate([part.ravel() for part in (*matrices, *biases)])


def _dense_products(layer: LayerFactors, other: LayerFactors) -> np.ndarray:
    if layer.positions == other.positions == 1:
        products = _matrix_product(_flat(layer.activations), _flat(other.activations))
        if layer.has_bias:
            products += 1
        products *= _matrix_product(_flat(layer.error_signals), _flat(other.error_signals))
        return products
    if _position_pairs_are_cheaper(layer, other):
        return _products_by_position_pairs(layer, other)
    return _products_by_gradient_rows(layer, other)


def _matrix_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns a bᵀ, in memory that is used again."""
    memory = _PRODUCTS.take(4 * len(a) * len(b)).view(np.float32)
    return np.matmul(a, b.T, out=memory.reshape(len(a), len(b)))


def _by_group(array: np.ndarray, groups: int) -> list[np.ndarray]:
    return [array] if groups == 1 else np.split(array, groups, axis=-1)


class _Gathered:
    """Some rows of an array at a time, in memory that is used again: numbers of a dtype."""

    def __init__(self, array: np.ndarray, size: int, dtype: np.dtype[Any]) -> None:
        self._array = array
        shape = (size, *array.shape[1:])
        count = math.prod(shape)
        self._gathered = _PRODUCTS.take(array.itemsize * count).view(array.dtype).reshape(shape)
        self._converted = None
        if array.dtype.kind == "f" and array.dtype != dtype:
            self._converted = _PRODUCTS.take(dtype.itemsize * count).view(dtype).reshape(shape)

    def rows(self, places: np.ndarray) -> np.ndarray:
        # Which rows there are is known: nothing is clipped, and nothing need be checked.
        gathered = self._gathered[: len(places)]
        self._array.take(places, axis=0, out=gathered, mode="clip")
        if self._converted is None:
            return gathered
        converted = self._converted[: len(places)]
        converted[...] = gathered
        return converted


def _one_by_one(
    e: np.ndarray, h: np.ndarray, f: np.ndarray, g: np.ndarray, has_bias: bool
) -> np.ndarray:
    """Returns ⟨G_i, G'_i⟩ of each example i with its counterpart, shape [m].

    Args:
        e: Error signals, shape [m, C] or [m, P, C].
        h: Activations, shape [m, d] or [m, P, d]; or indices, int32.
        f: Error signals of the counterparts.
        g: Activations of the counterparts.
        has_bias: Whether the layer has a bias.
    """
    is_one_hot = h.dtype.kind == "i"
    if e.ndim == f.ndim == 2:
        products = h[:, 0] == g[:, 0] if is_one_hot else np.einsum("ij,ij->i", h, g)
        return np.einsum("ij,ij->i", e, f) * (products + has_bias)
    e, f, h, g = (_by_position(part) for part in (e, f, h, g))
    g = g.transpose(0, 2, 1)
    products = h == g if is_one_hot else h @ g
    result: np.ndarray = ((e @ f.transpose(0, 2, 1)) * (products + has_bias)).sum(axis=(1, 2))
    return result


def _products_by_position_pairs(layer: LayerFactors, other: LayerFactors) -> np.ndarray:
    """All pairs of positions first, their sums then."""
    found = np.empty((len(layer), len(other)), np.float32)
    pair_bytes = 2 * 4 * layer.positions * other.positions
    # A square of examples by examples at a time.
    side = max(1, math.isqrt(_rows_that_fit(pair_bytes)))
    for columns in _pieces(len(other), side):
        f, g = (_by_position(part[columns]) for part in (other.error_signals, other.activations))
        f, g = (part.reshape(-1, part.shape[-1]).T for part in (f, g))
        for rows in _pieces(len(layer), _rows_that_fit(pair_bytes * min(side, len(other)))):
            e, h = (_by_position(part[rows]) for part in (layer.error_signals, layer.activations))
            products = h.reshape(-1, h.shape[-1]) @ g
            if layer.has_bias:
                products += 1
            products *= e.reshape(-1, e.shape[-1]) @ f
            shape = (len(e), layer.positions, -1, other.positions)
            found[rows, columns] = products.reshape(shape).sum(axis=(1, 3))
    return found


def _products_by_gradient_rows(layer: LayerFactors, other: LayerFactors) -> np.ndarray:
    """Some rows of all gradients at a time, materialised, so that all of them need not fit."""
    e, f = _by_position(layer.error_signals), _by_position(other.error_signals)
    h, g = _by_position(layer.activations), _by_position(other.activations)
    total = np.zeros((len(layer), len(other)), np.float32)
    if layer.has_bias:
        total += e.sum(axis=1) @ f.sum(axis=1).T
    row_bytes = 4 * h.shape[-1] * (len(layer) + len(other))
    for rows in _pieces(e.shape[-1], _rows_that_fit(row_bytes)):
        total += _gradient_rows(e, h, rows) @ _gradient_rows(f, g, rows).T
    return total


def _gradient_rows(e: np.ndarray, h: np.ndarray, rows: slice) -> np.ndarray:
    """Returns some rows of each example's Σ_p e_p h_pᵀ, one after the other."""
    found = np.matmul(e[:, :, rows].transpose(0, 2, 1), h)
    return found.reshape(len(found), found.shape[1] * found.shape[2])


def _products_by_index(layer: LayerFactors, other: LayerFactors) -> np.ndarray:
    """For one-hot activations: only rows of equal index meet."""
    total = np.zeros((len(layer), len(other)), np.float32)
    mine, theirs = _by_index(layer), _by_index(other)
    for index in sorted(mine.keys() & theirs.keys()):
        (rows, e), (columns, f) = mine[index], theirs[index]
        total[np.ix_(rows, columns)] += e @ f.T
    return total


def _by_index(layer: LayerFactors) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Returns for each index the examples that have it, and the sums of their error signals."""
    n, positions = len(layer), layer.positions
    if not n * positions:
        return {}
    indices = layer.activations.reshape(-1).astype(np.int64)
    examples = np.repeat(np.arange(n), positions)
    order = np.lexsort((examples, indices))
    indices, examples = indices[order], examples[order]
    signals = layer.error_signals.reshape(n * positions, -1)[order]
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = (indices[1:] != indices[:-1]) | (examples[1:] != examples[:-1])
    starts = np.flatnonzero(is_first)
    sums = np.add.reduceat(signals, starts, axis=0)
    found, edges = np.unique(indices[starts], return_index=True)
    ends = np.append(edges[1:], len(starts))
    return {
        int(index): (examples[starts[a:b]], sums[a:b])
        for index, a, b in zip(found, edges, ends, strict=True)
    }


def _position_pairs_are_cheaper(layer: LayerFactors, other: LayerFactors) -> bool:
    """Compares the multiplications of the two orders."""
    n, q, p, r = len(layer), len(other), layer.positions, other.positions
    outputs, width = layer.error_signals.shape[-1], layer.activations.shape[-1]
    by_pairs = n * p * q * r * (outputs + width)
    return by_pairs < (n * p + q * r + n * q) * outputs * (width + layer.has_bias)


def _flat(array: np.ndarray) -> np.ndarray:
    return array.reshape(len(array), array.shape[-1])


def _by_position(array: np.ndarray) -> np.ndarray:
    return array[:, None] if array.ndim == 2 else array


def _rows_that_fit(bytes_per_row: int) -> int:
    return max(1, _BUDGET_BYTES // max(1, bytes_per_row))


def _pieces(n: int, size: int) -> Iterator[slice]:
    for i in range(math.ceil(n / size)):
        yield slice(i * size, (i + 1) * size)
