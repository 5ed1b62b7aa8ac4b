"""Per-example gradients by automatic differentiation alone, to compare factors with."""

import keras
import numpy as np
import tensorflow as tf

from tracin_transforms.core.factors import LayerFactors
from tracin_transforms.core.protocols import input_rows
from tracin_transforms.models.precision import widen


def load_model(checkpoint, exact=False):
    """Returns the model of a .keras checkpoint; exact: computing in float64."""
    model = keras.saving.load_model(checkpoint.path, compile=False)
    if exact:
        widen(model)
    return model


def sparse_loss(targets, outputs):
    """Keras's loss of a batch, from logits."""
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)(targets, outputs)


def example_gradients(model, batch, variables, loss=sparse_loss):
    """Returns the gradient of each variable for each example alone, shape [n, ...]."""
    values = [variable.value for variable in variables]
    gradients = []
    for row in range(len(batch)):
        one = slice(row, row + 1)
        with tf.GradientTape() as tape:
            inputs = tf.nest.map_structure(tf.constant, input_rows(batch.inputs, one))
            outputs = model(inputs, training=False)
            value = loss(tf.constant(batch.targets[one]), outputs)
        found = tape.gradient(value, values)
        gradients.append([tf.convert_to_tensor(gradient).numpy() for gradient in found])
    return [np.stack(parts) for parts in zip(*gradients, strict=True)]


def kernels_and_biases(layer: LayerFactors, width: int | None = None):
    """Returns Σ_p e_p h_pᵀ of each group, shape [n, G, C/G, d/G], and Σ_p e_p, in float64."""
    h, e = layer.activations, layer.error_signals.astype(np.float64)
    if h.ndim == 2:
        h, e = h[:, None], e[:, None]
    h = np.eye(width)[h[..., 0]] if layer.is_one_hot else h.astype(np.float64)
    groups = zip(np.split(e, layer.groups, -1), np.split(h, layer.groups, -1), strict=True)
    kernels = np.stack([np.einsum("npc,npd->ncd", a, b) for a, b in groups], axis=1)
    return kernels, e.sum(axis=1)


def assert_factors(layer: LayerFactors, kernel, bias=None, tolerance=1e-5):
    """Compares factors with gradients: kernel [n, C, d] or [n, G, C, d], and bias [n, C]."""
    assert layer.has_bias or bias is None or layer.error_signals.shape[1:] == (1,)
    kernel = kernel[:, None] if kernel.ndim == 3 else kernel
    expected = kernel.reshape(len(kernel), -1)
    kernels, biases = kernels_and_biases(layer, kernel.shape[-1])
    found = kernels.reshape(len(kernels), -1)
    if bias is not None:
        expected = np.hstack([expected, bias.reshape(len(bias), -1)])
        found = np.hstack([found, biases]) if layer.has_bias else found
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() / np.abs(expected).max() <= tolerance
    assert np.abs(expected).max() > 0
