"""The trained weights of layers, as matrices whose gradients are outer products."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import keras
import numpy as np
import tensorflow as tf

from tracin_transforms.core.errors import InputError
from tracin_transforms.models.linear_maps import LinearMap, expanded, linear_map

Factors = tuple[tf.Tensor, tf.Tensor]


@dataclass(frozen=True, eq=False)
class WeightMatrix:
    """A weight of a layer whose gradient is Σ_p e_p h_pᵀ, for each of G groups.

    Attributes:
        part: Which of the layer's, ``lora_a``; empty for a kernel with its bias.
        variable: The variable.
        bias: That of the bias which goes with it, or None.
        factors: From one call's inputs and error signals, float32, as the layer has them, to
            activations [n, P, d] (indices [n, P, 1] where they are one-hot) and error signals
            [n, P, C].
        rows: From the variable's gradient, an array of its shape, to the matrices [G, C/G, d/G].
        groups: G.
        is_one_hot: Whether activations are given as indices.
    """

    part: str
    variable: keras.Variable
    bias: keras.Variable | None
    factors: Callable[[tf.Tensor, tf.Tensor], Factors]
    rows: Callable[[np.ndarray], np.ndarray]
    groups: int = 1
    is_one_hot: bool = False


def is_supported(layer: keras.layers.Layer) -> bool:
    """Returns whether the gradients of a layer's weights can be factored."""
    return _is_embedding(layer) or linear_map(layer) is not None


def weight_matrices(layer: keras.layers.Layer) -> list[WeightMatrix]:
    """Returns a layer's weights that are trained or, where it is frozen as a whole, all.

    Raises:
        InputError: A form of the layer is not supported.
    """
    if _is_embedding(layer):
        return _counted(layer, _embedding_matrices(layer))
    found = linear_map(layer)
    if found is None:
        return []
    matrices = _lora_matrices(layer, found) if found.lora else [_kernel_matrix(layer, found)]
    counted = _counted(layer, matrices)
    bias = found.bias
    if bias is None or not _counts(layer, bias):
        return [replace(matrix, bias=None) for matrix in counted]
    if any(matrix.bias is bias for matrix in counted):
        return counted
    return [*counted, _bias_matrix(found, bias)]


def _counts(layer: keras.layers.Layer, variable: keras.Variable) -> bool:
    """A layer that is frozen as a whole counts where it was named."""
    return bool(variable.trainable or not layer.trainable)


def _counted(layer: keras.layers.Layer, matrices: list[WeightMatrix]) -> list[WeightMatrix]:
    return [matrix for matrix in matrices if _counts(layer, matrix.variable)]


def _kernel_matrix(layer: keras.layers.Layer, found: LinearMap) -> WeightMatrix:
    inputs, kernel, outputs = expanded(found.equation)
    groups, contracted, produced = _roles(layer, inputs, kernel, outputs)
    sizes = dict(zip(kernel, found.kernel_view(np.empty(found.kernel.shape)).shape, strict=True))

    def factors(x: tf.Tensor, signal: tf.Tensor) -> Factors:
        x, signal = found.inputs(x), found.outputs(signal)
        inputs, _, outputs = expanded(found.equation, x.shape.rank)
        places = _places(inputs, kernel, outputs)
        return (
            _arranged(x, inputs, places, groups + contracted),
            _arranged(signal, outputs, places, groups + produced),
        )

    def rows(gradient: np.ndarray) -> np.ndarray:
        view = np.einsum(f"{kernel}->{groups}{produced}{contracted}", found.kernel_view(gradient))
        return view.reshape(*(_size(sizes, axes) for axes in (groups, produced, contracted)))

    # A bias that each output has of its own goes with the kernel, as one more activation.
    has_bias = found.bias is not None and _bias_axes(found, outputs) == groups + produced
    return WeightMatrix(
        part="",
        variable=found.kernel,
        bias=found.bias if has_bias else None,
        factors=factors,
        rows=rows,
        groups=_size(sizes, groups),
    )


def _lora_matrices(layer: keras.layers.Layer, found: LinearMap) -> list[WeightMatrix]:
    """``kernel + s A B``: A has the gradient s (B e) hᵀ, and B the gradient e (s Aᵀ h)ᵀ."""
    assert found.lora is not None
    a, b = found.lora
    inputs, kernel, outputs = expanded(found.equation)
    groups, contracted, produced = _roles(layer, inputs, kernel, outputs)
    last = kernel[-1]
    if groups or last not in produced:
        raise InputError(
            f"layer {layer.name!r} has LoRA with groups, or along an input: expected ungrouped "
            "outputs"
        )
    others, rank = produced.replace(last, ""), "R"
    a_axes = kernel[:-1] + rank

    def a_factors(x: tf.Tensor, signal: tf.Tensor) -> Factors:
        x, signal = found.inputs(x), found.outputs(signal)
        inputs, _, outputs = expanded(found.equation, x.shape.rank)
        places = _places(inputs, kernel, outputs)
        target = places + others + rank
        through_b = tf.einsum(f"{outputs},{rank}{last}->{target}", signal, _float32(b))
        return (
            _arranged(x, inputs, places, contracted),
            _arranged(found.lora_scale * through_b, target, places, others + rank),
        )

    def b_factors(x: tf.Tensor, signal: tf.Tensor) -> Factors:
        x, signal = found.inputs(x), found.outputs(signal)
        inputs, _, outputs = expanded(found.equation, x.shape.rank)
        places = _places(inputs, kernel, outputs) + others
        view = tf.reshape(_float32(a), found.kernel_view(np.empty(a.shape)).shape)
        through_a = tf.einsum(f"{inputs},{a_axes}->{places}{rank}", x, view)
        return (
            _arranged(found.lora_scale * through_a, places + rank, places, rank),
            _arranged(signal, outputs, places, last),
        )

    def a_rows(gradient: np.ndarray) -> np.ndarray:
        view = np.einsum(f"{a_axes}->{others}{rank}{contracted}", found.kernel_view(gradient))
        return view.reshape(1, -1, int(np.prod(view.shape[len(others) + 1 :])))

    return [
        WeightMatrix("lora_a", a, None, a_factors, a_rows),
        WeightMatrix("lora_b", b, None, b_factors, lambda gradient: gradient.T[None]),
    ]


def _bias_matrix(found: LinearMap, bias: keras.Variable) -> WeightMatrix:
    """A bias alone: the activation is 1, and what it is added to along an axis is summed up."""

    def factors(x: tf.Tensor, signal: tf.Tensor) -> Factors:
        rank = found.inputs(x).shape.rank
        _, _, outputs = expanded(found.equation, rank)
        axes = outputs[0] + _bias_axes(found, outputs)
        summed = tf.einsum(f"{outputs}->{axes}", found.outputs(signal))
        summed = tf.reshape(summed, [-1, 1, bias.value.shape.num_elements()])
        return tf.ones_like(summed[..., :1]), summed

    return WeightMatrix("bias", bias, None, factors, lambda gradient: gradient.reshape(1, -1, 1))


def _embedding_matrices(layer: keras.layers.Embedding) -> list[WeightMatrix]:
    def columns(gradient: np.ndarray) -> np.ndarray:
        return gradient.T[None]

    def factors(x: tf.Tensor, signal: tf.Tensor) -> Factors:
        return _by_position(_indices(x, layer)[..., None]), _by_position(signal)

    if not layer.lora_enabled:
        return [WeightMatrix("", layer._embeddings, None, factors, columns, is_one_hot=True)]
    a, b = layer.lora_embeddings_a, layer.lora_embeddings_b
    scale = layer.lora_alpha / layer.lora_rank

    def a_factors(x: tf.Tensor, signal: tf.Tensor) -> Factors:
        return factors(x, scale * tf.matmul(signal, _float32(b), transpose_b=True))

    def b_factors(x: tf.Tensor, signal: tf.Tensor) -> Factors:
        rows = tf.gather(_float32(a), _indices(x, layer))
        return _by_position(scale * rows), _by_position(signal)

    return [
        WeightMatrix("lora_a", a, None, a_factors, columns, is_one_hot=True),
        WeightMatrix("lora_b", b, None, b_factors, columns),
    ]


def _is_embedding(layer: keras.layers.Layer) -> bool:
    # One that also projects back has two gradients, of which this would be one.
    return isinstance(layer, keras.layers.Embedding) and not hasattr(layer, "tie_weights")


def _indices(x: tf.Tensor, layer: keras.layers.Embedding) -> tf.Tensor:
    """Returns what an embedding looks up; Keras counts negative indices from the end."""
    indices = tf.cast(x, tf.int32)
    return tf.where(indices < 0, indices + layer.input_dim, indices)


def _by_position(tensor: tf.Tensor) -> tf.Tensor:
    """Returns [n, ..., width] as [n, P, width]."""
    return _reshaped(tensor, tensor.shape[1:-1], tensor.shape[-1:])


def _roles(
    layer: keras.layers.Layer, inputs: str, kernel: str, outputs: str
) -> tuple[str, str, str]:
    """Returns the kernel's axes of groups, contracted and produced ones, each in its order."""
    groups = "".join(axis for axis in outputs if axis in kernel and axis in inputs)
    contracted = "".join(axis for axis in kernel if axis in inputs and axis not in outputs)
    produced = "".join(axis for axis in outputs if axis in kernel and axis not in inputs)
    is_example_first = inputs[0] == outputs[0] and inputs[0] not in kernel
    if not is_example_first or len(groups + contracted + produced) < len(kernel):
        raise InputError(
            f"layer {layer.name!r} computes {layer.equation!r}: expected an equation whose first "
            "axis is that of the examples, in the inputs and outputs alone, and whose kernel has "
            "axes of the inputs or outputs only"
        )
    return groups, contracted, produced


def _places(inputs: str, kernel: str, outputs: str) -> str:
    """Returns the axes of examples and positions, which the kernel does not have."""
    return "".join(axis for axis in outputs if axis in inputs and axis not in kernel)


def _arranged(tensor: tf.Tensor, axes: str, places: str, width: str) -> tf.Tensor:
    """Returns a tensor with the given axes as [n, P, width]; others are summed over."""
    target = places + width
    if target != axes:
        tensor = tf.einsum(f"{axes}->{target}", tensor)
    return _reshaped(tensor, tensor.shape[1 : len(places)], tensor.shape[len(places) :])


def _reshaped(tensor: tf.Tensor, positions: tf.TensorShape, width: tf.TensorShape) -> tf.Tensor:
    return tf.reshape(tensor, [-1, positions.num_elements(), width.num_elements()])


def _float32(variable: keras.Variable) -> tf.Tensor:
    return tf.cast(tf.convert_to_tensor(variable), tf.float32)


def _bias_axes(found: LinearMap, outputs: str) -> str:
    """Returns the bias's axes in the order of the outputs, which is that of its shape."""
    return "".join(axis for axis in outputs if axis in found.bias_axes)


def _size(sizes: dict[str, int], axes: str) -> int:
    return int(np.prod([sizes[axis] for axis in axes], dtype=int))
